"""The adapter file: values as PEFT saves them, plus packed indices and a header.

The file is the truth: loading makes the adapter's entries exactly those the file names, whatever
the config said. Its layout is `subnet_ft.adapter_file`'s.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subnet_ft.adapter import clip
from subnet_ft.adapter.inject import attach, detach, plan, sidecar_layers
from subnet_ft.adapter.kept_dtype import keep_values
from subnet_ft.adapter.layer import SubnetLayer
from subnet_ft.adapter_file import (
    HEADER_KEY,
    dump_header,
    entry_key,
    index_key,
    parse_header,
    values_key,
)
from subnet_ft.errors import MaskFormatError
from subnet_ft.storage.codec import decode_indices, encode_indices

if TYPE_CHECKING:
    from subnet_ft.adapter.config import SubnetConfig

_PREFIX = "base_model.model."


def pack(
    model: nn.Module,
    config: "SubnetConfig",
    adapter: str,
    state_dict: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Add indices and header to the values PEFT selected.

    Args:
        model: A PeftModel, or a model with an injected adapter.
        config: The adapter's config.
        adapter: Its name.
        state_dict: The adapter's parameters under the model's keys.

    Returns:
        What the adapter file holds, keys still with the adapter's name.
    """
    packed = {k: v for k, v in state_dict.items() if not k.endswith(f".{clip.NAME}")}
    parameters: dict[str, dict[str, Any]] = {
        name: {"shape": list(shape), "nnz": 0} for name, shape in config._shapes.items()
    }
    for module_name, layer in model.named_modules():
        if not isinstance(layer, SubnetLayer) or (subnet := layer.subnet(adapter)) is None:
            continue
        kind, encoded = encode_indices(subnet.indices.cpu(), math.prod(layer.shape))
        packed[f"{module_name}.subnet_ft_values.{adapter}.{kind}"] = encoded
        parameters[layer.name] = {
            "shape": list(layer.shape),
            "nnz": subnet.indices.numel(),
            "checksum": subnet.base_checksum,
        }
    header = {
        **config._source,
        "base_model": config.base_model_name_or_path or config._source.get("base_model", ""),
        "format": "subnet_adapter",
        "version": "1",
        "parameters": parameters,
    }
    packed[HEADER_KEY] = dump_header(header)
    return packed


def unpack(
    model: nn.Module,
    config: "SubnetConfig",
    adapter: str,
    state_dict: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Make the adapter's entries those of the file, and return the rest for PEFT to load.

    Args:
        model: A PeftModel, or a model with an injected adapter.
        config: The adapter's config.
        adapter: Its name.
        state_dict: The adapter file's tensors.

    Returns:
        The values under the file's keys; indices and header taken out.

    Raises:
        MaskFormatError: No header, or the header and the tensors disagree.
        MaskMismatchError: The file belongs to another model or base.
    """
    rest = {key.removeprefix(_PREFIX): tensor for key, tensor in state_dict.items()}
    if HEADER_KEY not in rest:
        raise MaskFormatError(
            f"adapter file: expected a tensor {HEADER_KEY!r}, found none; it was not written by "
            "subnet_ft or lost its indices, save the adapter again"
        )
    header = parse_header(rest.pop(HEADER_KEY))
    records = header["parameters"]
    indices, shapes, checksums = {}, {}, {}
    for name, record in records.items():
        shapes[name] = tuple(record["shape"])
        if not record["nnz"]:
            continue
        if "checksum" in record:
            checksums[name] = record["checksum"]
        indices[name] = _indices(rest, name, shapes[name], record["nnz"])
    root: nn.Module = getattr(model, "get_base_model", lambda: model)()
    current = {layer.name: layer for layer in sidecar_layers(root) if layer.subnet(adapter)}
    before = list(sidecar_layers(root))
    disabled = any(layer.disable_adapters for layer in before)
    trained = [(p, p.requires_grad) for layer in before for p in layer.parameters()]
    entries = plan(root, indices, shapes, checksums, config.entry_options["dtype"])
    for one in entries:
        present = current.get(one.name)
        subnet = present.subnet(adapter) if present else None
        # An unchanged set keeps its parameter: an optimizer may hold it already.
        if subnet and torch.equal(subnet.indices, one.indices):
            continue
        layer = attach(one, adapter, **config.entry_options)
        if layer not in before:
            layer._disable_adapters = disabled
        active: Any = getattr(model, "active_adapters", [adapter])
        layer.set_adapter(active() if callable(active) else list(active))
        layer.subnet_ft_values[adapter].requires_grad_(not config.inference_mode)
    keep_values(root)
    for parameter, requires_grad in trained:  # other adapters are as trainable as they were
        parameter.requires_grad_(requires_grad)
    for name in current.keys() - indices.keys():
        current[name].delete_adapter(adapter)
    detach([lay for lay in current.values() if not lay.subnet_ft_values], keep_values=False)
    config._source = {k: v for k, v in header.items() if isinstance(v, str)}
    config._shapes, config._pending = shapes, False
    for layer in sidecar_layers(root):
        if (subnet := layer.subnet(adapter)) and subnet.offmask:
            rest[entry_key(layer.name, clip.NAME)] = subnet.offmask.scalar.data
    return {_PREFIX + key: tensor for key, tensor in rest.items()}


def _indices(
    tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], nnz: int
) -> torch.Tensor:
    """Take one parameter's indices out of the file's tensors and check them."""
    numel = torch.Size(shape).numel()
    for kind in ("indices", "bitmap"):
        encoded = tensors.pop(index_key(name, kind).removeprefix(_PREFIX), None)
        if encoded is None:
            continue
        indices = decode_indices(kind, encoded, numel)
        values = tensors.get(values_key(name).removeprefix(_PREFIX))
        found = (indices.numel(), None if values is None else values.numel())
        if found != (nnz, nnz):
            raise MaskFormatError(
                f"adapter file, {name}: expected {nnz} indices and values, found {found[0]} and "
                f"{found[1]}; the file is damaged"
            )
        return indices
    raise MaskFormatError(f"adapter file, {name}: expected indices or a bitmap, found neither")
