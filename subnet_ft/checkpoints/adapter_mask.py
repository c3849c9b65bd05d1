"""The mask of a trained adapter, or of a mask file: whatever a path holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from subnet_ft.adapter_file import HEADER_KEYS
from subnet_ft.checkpoints.subnet import read_header, read_indices
from subnet_ft.errors import MaskFormatError
from subnet_ft.mask import SubnetMask
from subnet_ft.storage.tensor_files import SafetensorsFile

_ADAPTER_FILE = "adapter_model.safetensors"


def open_mask_or_adapter(path: str | os.PathLike[str]) -> SubnetMask:
    """Return the mask a path holds: a mask file, an adapter file, or an adapter directory.

    Raises:
        CheckpointError: an adapter file is damaged.
        MaskFormatError: the path holds no mask.
    """
    location = Path(path)
    if location.is_dir():
        if not (location / _ADAPTER_FILE).is_file():
            raise MaskFormatError(
                f"{location}: expected a mask file or an adapter directory with {_ADAPTER_FILE}, "
                "found neither; make a mask with `subnet-ft extract`."
            )
        return _adapter_mask(SafetensorsFile(location / _ADAPTER_FILE))
    if location.name == _ADAPTER_FILE and location.is_file():
        file = SafetensorsFile(location)
        if any(key in file.tensors for key in HEADER_KEYS):
            return _adapter_mask(file)
    return SubnetMask.load(location)


def _adapter_mask(file: SafetensorsFile) -> SubnetMask:
    header, _ = read_header(file)
    records = header["parameters"]
    return SubnetMask.from_source(
        _AdapterIndices(file, records),
        {name: record["nnz"] for name, record in records.items()},
        {name: tuple(record["shape"]) for name, record in records.items()},
        checksums={n: r["checksum"] for n, r in records.items() if "checksum" in r},
        metadata={
            key: value
            for key, value in header.items()
            if isinstance(value, str) and key not in ("format", "version")
        },
        changed={},
    )


class _AdapterIndices(Mapping[str, Tensor]):
    """Indices read from the adapter file each time they are asked for."""

    def __init__(self, file: SafetensorsFile, records: Mapping[str, Any]) -> None:
        self._file, self._records = file, records

    def __getitem__(self, name: str) -> Tensor:
        return read_indices(self._file, name, self._records[name])

    def __iter__(self) -> Iterator[str]:
        return (name for name, record in self._records.items() if record["nnz"])

    def __len__(self) -> int:
        return sum(1 for _ in self)
