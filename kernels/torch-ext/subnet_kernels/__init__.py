"""Operations on the masked entries of weights: gather, scatter, AdamW, in Triton and in torch.

`reference` is loaded at once and needs torch alone; the rest when first asked for:

- `twins`: every operation in torch, by name.
- `jitted`: the same names, launching Triton kernels.
- `encoding`: flat indices or bitmap, and which is read faster.
"""

from importlib import import_module
from types import ModuleType

from . import reference

__all__ = ["encoding", "jitted", "reference", "twins"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
