"""The adapter file: how `adapter_model.safetensors` of type SUBNET_FT is laid out.

PEFT writes the file, so keys carry its prefix. For a base parameter `<owner>.<leaf>`:

    base_model.model.<owner>.subnet_<leaf>.subnet_ft_values.<last>    (nnz,) float32: weights
    base_model.model.<owner>.subnet_<leaf>.subnet_ft_values.indices   or .bitmap, as in a mask file

where `<last>` is "bias" when the leaf is "bias", else "weight". Values are absolute weights, not
deltas. One tensor `subnet_ft_header` (uint8, UTF-8 JSON) describes them, since PEFT writes its own
string metadata:

    {"format": "subnet_adapter", "version": "1", "base_model": ..., "rule": ...,
     "parameters": {name: {"shape": [...], "nnz": n, "checksum": hex}}}

The checksum is of the base's values at the indices, as in a mask file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subnet_ft.errors import MaskFormatError
from subnet_ft.mask_file import parse_records

FORMAT = "subnet_adapter"
VERSION = "1"
PREFIX = "base_model.model."
HEADER_KEY = "subnet_ft_header"
HEADER_KEYS = (HEADER_KEY, PREFIX + HEADER_KEY)


def entry_key(name: str, last: str) -> str:
    """Return where an adapter keeps something of a parameter, without PEFT's prefix.

    Args:
        name: the base parameter, `<owner>.<leaf>`.
        last: the last component of the key.
    """
    owner, _, leaf = name.rpartition(".")
    return f"{owner}{'.' if owner else ''}subnet_{leaf}.subnet_ft_values.{last}"


def values_key(name: str) -> str:
    """Return the key of a parameter's values.

    Example:
        >>> values_key("model.norm.weight")
        'base_model.model.model.norm.subnet_weight.subnet_ft_values.weight'
    """
    leaf = name.rpartition(".")[2]
    return PREFIX + entry_key(name, "bias" if leaf == "bias" else "weight")


def index_key(name: str, kind: str) -> str:
    """Return the key of a parameter's indices; `kind` is "indices" or "bitmap"."""
    return PREFIX + entry_key(name, kind)


def dump_header(header: Mapping[str, Any]) -> Tensor:
    """Return the header as a tensor.

    Args:
        header: base_model, rule, parameters, ...; format and version are added.

    Returns:
        (bytes,) uint8.
    """
    text = json.dumps({**header, "format": FORMAT, "version": VERSION}, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def parse_header(tensor: Tensor, where: str = "adapter") -> dict[str, Any]:
    """Parse and check the header.

    Args:
        tensor: (bytes,) uint8.
        where: what errors name: the file.

    Raises:
        MaskFormatError: no JSON object, another format or version, or a wrong parameter entry.
    """
    try:
        header = json.loads(bytes(tensor.to(torch.uint8).cpu().contiguous().numpy()))
    except ValueError as error:
        raise MaskFormatError(
            f"{where}: {HEADER_KEY} must be UTF-8 JSON, got {error}; save the adapter again."
        ) from error
    found = (header.get("format"), header.get("version")) if isinstance(header, dict) else None
    if found != (FORMAT, VERSION):
        raise MaskFormatError(
            f"{where}: {HEADER_KEY} must be of format {FORMAT} version {VERSION}, got {found}; "
            "save the adapter again with this version."
        )
    header["parameters"] = parse_records(where, header.get("parameters", {}))
    return dict(header)
