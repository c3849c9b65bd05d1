"""Backward ends at the first masked layer: nothing below it needs a gradient.

Autograd sees to that by itself, frozen weights and all, unless the embedding's output is made to
require gradients. transformers does so whenever checkpointing is enabled, TRL for every adapter:
reentrant checkpointing would else find no input that requires them. The non-reentrant kind, the
default, has no need of it.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn

_METHOD = "enable_input_require_grads"


def install(root: nn.Module) -> None:
    """Have inputs require gradients only where reentrant checkpointing asks for it.

    Args:
        root: The base model; left alone if it is no transformers model.
    """
    if hasattr(root, _METHOD):
        root.__dict__[_METHOD] = MethodType(_enable_where_needed, root)
        _follow(root)


def uninstall(root: nn.Module) -> None:
    """Undo `install`; what was enabled stays so, and then without exception."""
    if root.__dict__.pop(_METHOD, None) is not None and getattr(root, "_require_grads_hooks", []):
        root.disable_input_require_grads()  # type: ignore[operator]
        root.enable_input_require_grads()  # type: ignore[operator]


def _enable_where_needed(root: Any) -> None:
    getattr(type(root), _METHOD)(root)
    _follow(root)


def _follow(root: Any) -> None:
    """Run after each of transformers' hooks, and be removed with them."""
    hooks = getattr(root, "_require_grads_hooks", [])
    ids = {hook.id for hook in hooks}
    for module in root.modules():
        if ids & module._forward_hooks.keys():
            hooks.append(module.register_forward_hook(MethodType(_undo_needless, root)))


def _undo_needless(root: nn.Module, module: nn.Module, args: Any, output: torch.Tensor) -> None:
    # A leaf comes from nothing that trains: its gradient would go nowhere.
    if output.is_leaf and not _reentrant(root):
        output.requires_grad_(False)


def _reentrant(root: nn.Module) -> bool:
    functions = (
        module._gradient_checkpointing_func
        for module in root.modules()
        if getattr(module, "gradient_checkpointing", False)
        and hasattr(module, "_gradient_checkpointing_func")
    )
    # torch's own default, where a model's code does not say, is reentrant.
    return any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions)
