"""What happens around every optimizer step: check the optimizer before, write the weights after.

Torch calls these for every optimizer in the process, bitsandbytes' included, also through
accelerate. Version counters would not do: fused optimizers change values without counting.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from subnet_ft.adapter.binding import sidecar_of
from subnet_ft.adapter.layer import ALIVE, SubnetLayer
from subnet_ft.adapter.registry import layers_of
from subnet_ft.adapter.writing import flush_all
from subnet_ft.errors import ConfigError, UnsupportedError

# Their update of an entry depends on the shape of its weight, which compact values do not have, or
# (L-BFGS) they run the model in the middle of a step.
SHAPE_DEPENDENT = (
    "lbfgs",
    "adafactor",
    "muon",
    "lamb",
    "lars",
    "galore",
    "apollo",
    "lomo",
    "shampoo",
    "soap",
)

_installed = False
_stepping: WeakKeyDictionary[torch.optim.Optimizer, list[SubnetLayer]] = WeakKeyDictionary()


def install() -> None:
    """Register both hooks, once a process."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _installed = True


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for layer in ALIVE:
        layer.settle()  # values stepped while they are off are written when they come on
    if getattr(optimizer, "writes_weights", False):
        return  # SubnetAdamW knows its sidecars
    layers = _stepping[optimizer] = layers_of(optimizer)
    if not layers:
        return
    name = type(optimizer).__name__.lower()
    if any(word in name for word in SHAPE_DEPENDENT):
        raise UnsupportedError(
            f"expected an elementwise optimizer (AdamW, SGD, Lion, ...), found "
            f"{type(optimizer).__name__}, whose update depends on the shape of the weight "
            "or runs the model within a step; choose another optim"
        )
    if "schedulefree" in name:
        raise UnsupportedError(
            "expected an optimizer that changes values in step() alone, found "
            f"{type(optimizer).__name__}, whose train() and eval() change them behind the weights' "
            "back; choose another optim"
        )
    lossless = getattr(optimizer, "master", None) == "residual"
    for layer in layers:
        for subnet in layer.live_subnets:
            if not lossless and subnet.values.dtype == torch.bfloat16:
                raise ConfigError(
                    f"{layer.name}: bf16 values lose small updates: expected SubnetAdamW("
                    f'master="residual"), found {type(optimizer).__name__}; use that, or '
                    'values_dtype="float32"'
                )
        layer.forget_norms()
    _carry_overrides(optimizer, layers)


def _carry_overrides(optimizer: Any, layers: list[SubnetLayer]) -> None:
    """Have what bitsandbytes was told about a weight hold for its values.

    Its `GlobalOptimManager` has options for single weights: the Trainer registers 32-bit state for
    embeddings there. It looks for those weights among the optimizer's parameters, at the first
    step; ours holds their values instead.
    """
    manager = getattr(optimizer, "mng", None)
    if manager is None or optimizer.initialized:
        return
    for module, leaf, options in manager.module_weight_config_triple:
        layer = sidecar_of(module, leaf)
        if layer in layers:
            values = [subnet.values for subnet in layer.live_subnets]
            manager.override_config(values, key_value_dict=dict(options))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    flush_all(_stepping.pop(optimizer, []))
