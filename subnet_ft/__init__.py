"""Sparse-subnetwork finetuning for Hugging Face trainers.

The public names load on first use, so that ``import subnet_ft`` costs nothing and pulls in neither
triton nor transformers. Importing it makes PEFT know the ``SUBNET_FT`` type (see ``peft_hook``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from subnet_ft import peft_hook

if TYPE_CHECKING:
    from subnet_ft.adapter import SubnetConfig, SubnetModel
    from subnet_ft.callback import SubnetCallback
    from subnet_ft.discovery import SubnetDiscoveryCallback
    from subnet_ft.errors import SubnetError
    from subnet_ft.extract import extract_mask
    from subnet_ft.mask import SubnetMask
    from subnet_ft.merge import merge_checkpoint
    from subnet_ft.meter import SubnetMeter, SubnetMeterCallback
    from subnet_ft.optim import SubnetAdamW

__version__ = "0.1.0"

_HOME = {
    "SubnetAdamW": "subnet_ft.optim",
    "SubnetCallback": "subnet_ft.callback",
    "SubnetConfig": "subnet_ft.adapter",
    "SubnetDiscoveryCallback": "subnet_ft.discovery",
    "SubnetError": "subnet_ft.errors",
    "SubnetMask": "subnet_ft.mask",
    "SubnetMeter": "subnet_ft.meter",
    "SubnetMeterCallback": "subnet_ft.meter",
    "SubnetModel": "subnet_ft.adapter",
    "extract_mask": "subnet_ft.extract",
    "merge_checkpoint": "subnet_ft.merge",
}

__all__ = [
    "SubnetAdamW",
    "SubnetCallback",
    "SubnetConfig",
    "SubnetDiscoveryCallback",
    "SubnetError",
    "SubnetMask",
    "SubnetMeter",
    "SubnetMeterCallback",
    "SubnetModel",
    "extract_mask",
    "merge_checkpoint",
]

peft_hook.install()


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *__all__})
