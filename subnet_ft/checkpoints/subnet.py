"""Our own adapter laid over its base: absolute values at indices, the base checked first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subnet_ft.adapter_file import HEADER_KEYS, index_key, parse_header, values_key
from subnet_ft.checkpoints.base import Checkpoint
from subnet_ft.checkpoints.overlay import Change, Patch, replacements
from subnet_ft.errors import MaskFormatError, MaskMismatchError
from subnet_ft.storage.arrays import to_array
from subnet_ft.storage.codec import KINDS, Checksum, decode_indices
from subnet_ft.storage.tensor_files import SafetensorsFile

_CHUNK = 1 << 20


class _Subnet:
    """W with values at indices; W's own values there must have the recorded checksum."""

    def __init__(
        self,
        file: SafetensorsFile,
        name: str,
        record: Mapping[str, Any],
        base: Checkpoint,
        base_name: str,
    ) -> None:
        self._file, self._name, self._record = file, name, record
        self._base, self._base_name = base, base_name

    def load(self) -> Change:
        indices = read_indices(self._file, self._name, self._record).long()
        values = self._file.read(values_key(self._name), 0, len(indices))
        expected = self._record.get("checksum")
        if expected and expected != self._checksum(indices):
            raise MaskMismatchError(
                f"{self._name}: the adapter was trained on other base values (checksum "
                f"{expected}) than {self._base.source} has; use the base it was trained on."
            )

        def apply(weight: Tensor, start: int) -> None:
            part = _between(indices, start, start + weight.numel())
            weight[indices[part] - start] = values[part].to(weight.dtype)

        return apply

    def _checksum(self, indices: Tensor) -> str:
        pieces = Checksum()
        numel = self._base.tensors[self._base_name].numel
        for start in range(0, numel, _CHUNK):
            part = _between(indices, start, start + _CHUNK)
            if part.start < part.stop:
                values = self._base.read(self._base_name, start, min(start + _CHUNK, numel))
                pieces.update(to_array(values[indices[part] - start]))
        return pieces.hexdigest()


def _between(indices: Tensor, start: int, stop: int) -> slice:
    first, last = torch.searchsorted(indices, torch.tensor([start, stop])).tolist()
    return slice(first, last)


def read_indices(file: SafetensorsFile, name: str, record: Mapping[str, Any]) -> Tensor:
    """Read and check one parameter's indices in an adapter file.

    Args:
        file: adapter_model.safetensors.
        name: the base parameter.
        record: its entry in the header.

    Returns:
        (nnz,) int32 or int64, strictly increasing.

    Raises:
        MaskFormatError: they are not what the header says.
    """
    kind = next(kind for kind in KINDS if index_key(name, kind) in file.tensors)
    key = index_key(name, kind)
    info = file.tensors[key]
    try:
        stored = file.read(key, 0, info.numel).view(info.shape)
        indices = decode_indices(kind, stored, math.prod(record["shape"]))
    except MaskFormatError as error:
        raise MaskFormatError(f"{file.path}: {key}: {error}") from error
    if len(indices) != record["nnz"]:
        raise MaskFormatError(
            f"{file.path}: {key} must hold nnz = {record['nnz']} indices, got {len(indices)}; "
            "save the adapter again."
        )
    return indices


def read_header(file: SafetensorsFile) -> tuple[dict[str, Any], set[str]]:
    """Read an adapter file's header and check that every parameter in it is stored.

    Returns:
        The header, and the keys it explains: its own, values and indices.

    Raises:
        MaskFormatError: no header, or the file does not hold what it says.
    """
    header_key = next((key for key in HEADER_KEYS if key in file.tensors), None)
    if header_key is None:
        raise MaskFormatError(
            f"{file.path}: expected a tensor {HEADER_KEYS[0]}, found none; save the adapter again."
        )
    raw = file.read(header_key, 0, file.tensors[header_key].numel)
    header = parse_header(raw, str(file.path))
    explained = {header_key}
    for name, record in header["parameters"].items():
        keys = [values_key(name), *(index_key(name, kind) for kind in KINDS)]
        stored = [key for key in keys if key in file.tensors]
        values = file.tensors.get(values_key(name))
        complete = len(stored) == 2 and values is not None and values.shape == (record["nnz"],)
        if record["nnz"] and not complete:
            raise MaskFormatError(
                f"{file.path}: {name}: expected {record['nnz']} values and their indices, found "
                f"{stored}; save the adapter again."
            )
        explained.update(stored)
    return header, explained


def subnet_patches(file: SafetensorsFile, base: Checkpoint) -> dict[str, Patch]:
    """Return what our adapter does to each parameter.

    Args:
        file: its adapter_model.safetensors.
        base: what it lies over.

    Raises:
        MaskFormatError: the file breaks the format.
        MaskMismatchError: it was made for a parameter the base does not have in that shape.
    """
    header, explained = read_header(file)
    others = [key for key in file.tensors if key not in explained]
    patches: dict[str, Patch] = {**replacements(file, others, base)}
    for name, record in header["parameters"].items():
        if not record["nnz"]:
            continue
        base_name = base.aliases.get(name, name)
        found = base.tensors.get(base_name)
        if found is None or found.shape != tuple(record["shape"]):
            raise MaskMismatchError(
                f"{name}: the adapter was made for shape {tuple(record['shape'])}, {base.source} "
                f"has {found.shape if found else 'no such parameter'}; use the base it was "
                "trained on."
            )
        patches[base_name] = _Subnet(file, name, record, base, base_name)
    return patches
