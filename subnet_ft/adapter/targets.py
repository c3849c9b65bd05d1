"""Which parameters ``include`` and ``exclude`` mean on a given model."""

import re
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn
from transformers.pytorch_utils import Conv1D

from subnet_ft.adapter.inject import Entries, base_parameters, sidecar_layers
from subnet_ft.adapter.quantized import kind_of, refuse_other_quantization, weight_shape
from subnet_ft.errors import ConfigError
from subnet_ft.mask import SubnetMask
from subnet_ft.names import Patterns, select_names

if TYPE_CHECKING:
    from subnet_ft.adapter.config import SubnetConfig


def saved_whole(root: nn.Module, modules_to_save: list[str] | None) -> set[str]:
    """Name the base parameters of ``modules_to_save``, found by PEFT's rule: a name's ending.

    They train whole, so a subnetwork leaves them out.
    """
    endings = tuple(modules_to_save or ())
    return {
        f"{prefix}.{leaf}"
        for prefix, module in root.named_modules()
        if endings and prefix.endswith(endings)
        for leaf, _ in module.named_parameters()
    }


def check_enclosed(root: nn.Module, config: "SubnetConfig", entries: list[Entries]) -> None:
    """Refuse masked weights inside modules that PEFT is about to wrap and copy.

    Raises:
        ConfigError: ``modules_to_save`` or ``trainable_token_indices`` cover a masked weight, also
            as the other use of a tied one, or ``clip="dense"`` would see one rank's norm only.
    """
    if config.clip == "dense" and dist.is_available() and dist.is_initialized():
        if dist.get_world_size() > 1:
            raise ConfigError(
                'clip="dense": expected one process, found several, each of which would clip by '
                'its own norm; use clip="compact"'
            )
    for entry in entries:
        if config.clip == "dense" and kind_of(*entry.owners[0]):
            raise ConfigError(
                f'{entry.name}: clip="dense" reads the dense gradient, which a quantized weight '
                'has none of: expected clip="compact", found "dense"; use that'
            )
    endings = tuple(config.modules_to_save or ())
    tokens = config.trainable_token_indices
    if tokens:
        endings += tuple(tokens) if isinstance(tokens, dict) else ("embed_tokens", "wte")
    wrapped = {
        id(inner): name
        for name, module in root.named_modules()
        if endings and name.endswith(endings)
        for inner in module.modules()
    }
    masked = [(entry.name, entry.owners) for entry in entries]
    masked += [(layer.name, list(layer.owners)) for layer in sidecar_layers(root)]
    for name, owners in masked:
        for module, _ in owners:
            if id(module) in wrapped:
                raise ConfigError(
                    f"{name} is masked, and {wrapped[id(module)]} trains whole or by token: "
                    "expected one or the other; exclude it from the mask or from modules_to_save "
                    "/ trainable_token_indices"
                )


def target_shapes(
    root: nn.Module, include: Patterns, exclude: Patterns
) -> dict[str, tuple[int, ...]]:
    """Resolve ``include`` / ``exclude`` to base parameters.

    Args:
        root: The base model.
        include: Patterns of names, ``"all"``, or ``"all-linear"`` (also when None).
        exclude: Patterns of names to leave out.

    Returns:
        Name -> shape of every floating-point or quantized parameter meant.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left.
        UnsupportedError: All is asked of a model that is quantized otherwise than by bitsandbytes.
    """
    linear, everything = _names(root)
    if include in (None, "all-linear", "all"):
        refuse_other_quantization(root)
    if include in (None, "all-linear"):
        names = select_names(linear, None, exclude)
    else:
        names = select_names(everything, None if include == "all" else include, exclude)
    return {name: everything[name] for name in names}


def filter_mask(
    root: nn.Module, mask: SubnetMask, include: Patterns, exclude: Patterns
) -> SubnetMask:
    """Keep the part of a mask that ``include`` / ``exclude`` mean; all of it by default.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left.
    """
    if include == "all-linear":
        include = [re.escape(name) for name in _names(root)[0] if name in mask.shapes]
    elif include == "all":
        include = None
    return mask if include is None and exclude is None else mask.filter(include, exclude)


def _names(root: nn.Module) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Weights of linear layers without the output head (PEFT's "all-linear"), and everything."""
    find_head = getattr(root, "get_output_embeddings", lambda: None)
    head = find_head()
    linear, everything = [], {}
    for name, owners in base_parameters(root).items():
        module, leaf = owners[0]
        weight = module._parameters[leaf]
        if weight is None or not (weight.is_floating_point() or kind_of(module, leaf)):
            continue
        everything[name] = weight_shape(module, leaf)
        is_linear = any(isinstance(m, nn.Linear | Conv1D) and lf == "weight" for m, lf in owners)
        if is_linear and all(m is not head for m, _ in owners):
            linear.append(name)
    return linear, everything
