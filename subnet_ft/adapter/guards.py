"""Two methods of a transformers model that must know about an attached adapter."""

from types import MethodType
from typing import Any

import torch
from torch import nn

from subnet_ft.errors import UnsupportedError


def guard(root: nn.Module) -> None:
    """Refuse resizing embeddings, and let weights be tied as the parameters they are.

    Args:
        root: The base model; methods it does not have are left alone.
    """
    if hasattr(root, "resize_token_embeddings"):
        root.__dict__["resize_token_embeddings"] = _refuse_resize
    if hasattr(root, "tie_weights"):
        root.__dict__["tie_weights"] = MethodType(_tie_raw, root)


def unguard(root: nn.Module) -> None:
    """Undo `guard`."""
    for name in ("resize_token_embeddings", "tie_weights"):
        root.__dict__.pop(name, None)


def _refuse_resize(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedError(
        "expected embeddings of the size the adapter was attached to, found a resize; "
        "resize embeddings before attaching the adapter"
    )


def _tie_raw(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():  # without gradients a bound weight reads as its parameter
        return type(root).tie_weights(root, *args, **kwargs)  # type: ignore[attr-defined]
