"""Attaching sidecars to a model, and taking them off again."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from subnet_ft import ops
from subnet_ft.adapter.binding import bind_owner, release_owner, sidecar_of
from subnet_ft.adapter.layer import SubnetLayer
from subnet_ft.adapter.quantized import (
    check_quantized,
    entries_dtype,
    kind_of,
    refuse_other_quantization,
    weight_shape,
)
from subnet_ft.adapter.quantized_layer import CLASSES, read_dequantized
from subnet_ft.adapter.writing import read_entries
from subnet_ft.errors import ConfigError, MaskMismatchError, UnsupportedError
from subnet_ft.storage.codec import checksum

logger = logging.getLogger(__name__)

_CHILD = "subnet_"  # sidecar of `q_proj.weight`: the child `q_proj.subnet_weight`
Owners = list[tuple[nn.Module, str]]


def base_parameters(root: nn.Module) -> dict[str, Owners]:
    """Map each base parameter to the places it is used in: (module, leaf) pairs.

    Tied weights come once, under the name ``named_parameters()`` gives; adapters are left out.
    """
    places: dict[str, Owners] = {}
    first: dict[int, str] = {}
    sidecars = {id(m) for layer in sidecar_layers(root) for m in layer.modules()}
    for prefix, module in root.named_modules():
        if id(module) in sidecars:
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = first.setdefault(id(parameter), f"{prefix}.{leaf}" if prefix else leaf)
                places.setdefault(name, []).append((module, leaf))
    return places


def sidecar_layers(root: nn.Module) -> Iterator[SubnetLayer]:
    """Iterate over a model's sidecars."""
    return (module for module in root.modules() if isinstance(module, SubnetLayer))


@dataclass
class Entries:
    """One parameter's part of an adapter, checked against the model and ready to attach."""

    name: str
    owners: Owners
    indices: torch.Tensor
    originals: torch.Tensor


def plan(
    root: nn.Module,
    mask: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    checksums: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> list[Entries]:
    """Check a mask against a model, touching nothing, and read the base's values at its entries.

    Args:
        root: The base model.
        mask: Parameter name -> (nnz,) indices; only names with entries.
        shapes: Parameter name -> the shape the mask was made for.
        checksums: Parameter name -> checksum of the base's values at the entries, where known.
        dtype: What the values shall have.

    Raises:
        ConfigError: bfloat16 values for a weight that is not bfloat16.
        MaskMismatchError: It is empty, names other parameters, has other shapes, or was taken from
            a base with other values at its entries (compared in bf16).
        UnsupportedError: A masked weight can neither be edited in place nor is one that
            bitsandbytes quantized.
    """
    places = base_parameters(root)
    if not len(mask):
        raise MaskMismatchError(
            "expected a mask with entries, found an empty one; nothing to train"
        )
    unknown = [name for name in mask if name not in places]
    if unknown:
        refuse_other_quantization(root)
        raise MaskMismatchError(
            f"mask of another model: {type(root).__name__} has no parameter {unknown[0]!r}"
            f"{f' (nor {len(unknown) - 1} more)' if unknown[1:] else ''}; "
            "extract the mask from this base model"
        )
    entries, unchecked = [], 0
    for name in mask:
        module, leaf = places[name][0]
        weight = module._parameters[leaf]
        assert weight is not None
        quantized = kind_of(module, leaf) is not None
        if quantized:
            check_quantized(name, module)
        else:
            check_weight(name, weight)
        if (shape := weight_shape(module, leaf)) != tuple(shapes[name]):
            raise MaskMismatchError(
                f"{name}: mask was made for shape {tuple(shapes[name])}, weight is {shape}; "
                "extract the mask from this base model"
            )
        own_dtype = entries_dtype(module) if quantized else weight.dtype
        if dtype == torch.bfloat16 != own_dtype:
            raise ConfigError(
                f'values_dtype="bfloat16": expected a bf16 base, found {own_dtype} in {name}; '
                'load the base in bf16 or use values_dtype="float32"'
            )
        indices = mask[name].to(weight.device, ops.INDEX_DTYPE)
        layer = sidecar_of(module, leaf)
        if quantized:
            originals = read_dequantized(module, indices)
        else:
            originals = layer.read_base(indices) if layer else read_entries(weight.data, indices)
        expected = checksums.get(name)
        if expected is not None and (found := checksum(originals)) != expected:
            if not quantized:
                raise MaskMismatchError(
                    f"{name}: wrong base model: expected checksum {expected} of its values at the "
                    f"mask's entries, found {found}; load the base model the mask was made on"
                )
            unchecked += 1
        entries.append(Entries(name, places[name], indices, originals))
    if unchecked:
        logger.warning(
            "%d masked weights are quantized and not what the mask was made on: its base model "
            "before quantization or another one, which cannot be told",
            unchecked,
        )
    return entries


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight that cannot be edited in place.

    Raises:
        UnsupportedError: It is quantized otherwise than by bitsandbytes, float8, on the meta device
            or not contiguous.
    """
    library = type(weight).__module__.partition(".")[0]
    if not weight.is_floating_point() or library == "torchao":
        raise UnsupportedError(
            f"{name}: expected a weight in fp32, bf16 or fp16, or one quantized by bitsandbytes, "
            f"found a {type(weight).__name__} of {weight.dtype}; load the base in one of those"
        )
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(f"{name}: expected fp32, bf16 or fp16, found {weight.dtype}")
    if weight.is_meta or not weight.is_contiguous():
        state = "a weight on the meta device" if weight.is_meta else f"strides {weight.stride()}"
        raise UnsupportedError(f"{name}: expected a loaded, contiguous weight, found {state}")


def attach(entries: Entries, adapter: str, **options: Any) -> SubnetLayer:
    """Give an adapter its entries of one parameter, on a sidecar made at the first call.

    Args:
        entries: What `plan` found.
        adapter: Its name.
        **options: Of `SubnetLayer.add`.
    """
    module, leaf = entries.owners[0]
    layer = sidecar_of(module, leaf)
    if layer is None:
        layer = CLASSES[kind_of(module, leaf)](entries.name, entries.owners)
        module.add_module(_CHILD + leaf, layer)
        for owner, owner_leaf in entries.owners:
            bind_owner(owner, owner_leaf, layer)
    layer.add(adapter, entries.indices, entries.originals, **options)
    return layer


def detach(layers: Iterable[SubnetLayer], *, keep_values: bool) -> None:
    """Take sidecars off; the weights keep the live values or get the originals back."""
    for layer in list(layers):
        if not keep_values:
            layer.enable_adapters(False)
        layer.settle()
        for owner, leaf in layer.owners:
            release_owner(owner, leaf)
        module, leaf = layer.owners[0]
        delattr(module, _CHILD + leaf)
