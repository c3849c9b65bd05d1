"""Torch, imported when it is first used; see `subnet_ft.storage.arrays` for why.

``from subnet_ft.storage.lazy import torch`` in modules that extraction passes through.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch = _Torch()
