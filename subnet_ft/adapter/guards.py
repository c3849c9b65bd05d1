"""What a base model must know about an attached adapter: casts, resizes, ties, empty adapters."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from subnet_ft.adapter import early_stop, quantized, transformers_methods
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.errors import ConfigError, UnsupportedError

_HOOK = "_subnet_hooks"


def guard(root: nn.Module) -> None:
    """Refuse casts and resizes, tie weights as the parameters they are, expect entries to run with.

    Args:
        root: The base model; methods it does not have are left alone.
    """
    if _HOOK in root.__dict__:
        return
    root.__dict__[_HOOK] = (
        root.register_forward_pre_hook(_expect_entries),
        root.register_load_state_dict_post_hook(_rewrite_after_load),
    )
    root.__dict__["_apply"] = MethodType(_checked_apply, root)
    if hasattr(root, "resize_token_embeddings"):
        root.__dict__["resize_token_embeddings"] = MethodType(_checked_resize, root)
    if hasattr(root, "tie_weights"):
        root.__dict__["tie_weights"] = MethodType(_tie_raw, root)
    early_stop.install(root)
    quantized.keep_unpacked(root)
    transformers_methods.install(root)


def unguard(root: nn.Module) -> None:
    """Undo `guard`."""
    if _HOOK in root.__dict__:
        for hook in root.__dict__.pop(_HOOK):
            hook.remove()
    for name in ("_apply", "resize_token_embeddings", "tie_weights"):
        root.__dict__.pop(name, None)
    early_stop.uninstall(root)
    quantized.allow_packing(root)
    transformers_methods.uninstall(root)


def _checked_apply(root: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any) -> Any:
    for layer in sidecar_layers(root):  # all before the first module is cast
        layer.check_cast(fn)
    return type(root)._apply(root, fn, *args)


def _rewrite_after_load(root: nn.Module, incompatible_keys: Any) -> None:
    for layer in sidecar_layers(root):  # a tied weight is loaded again by its later uses
        layer.rewrite()


def _expect_entries(root: nn.Module, args: Any) -> None:
    configs = getattr(root, "peft_config", {})
    waiting = [name for name, config in configs.items() if getattr(config, "_pending", False)]
    if waiting:
        raise ConfigError(
            f"adapter {waiting[0]!r} has no entries: expected a mask or an adapter file, found "
            "neither; use SubnetConfig(mask=...), PeftModel.from_pretrained or load_adapter"
        )


def _checked_resize(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if any(True for _ in sidecar_layers(root)):
        raise UnsupportedError(
            "expected embeddings of the size the adapter was attached to, found a resize; "
            "resize embeddings before attaching the adapter"
        )
    return type(root).resize_token_embeddings(root, *args, **kwargs)  # type: ignore[attr-defined]


def _tie_raw(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():  # without gradients a bound weight reads as its parameter
        return type(root).tie_weights(root, *args, **kwargs)  # type: ignore[attr-defined]
