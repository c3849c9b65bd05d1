"""The mask file: a safetensors file that any tool can write.

Tensors, for every parameter with at least one index, whichever of the two is smaller in bytes:

    <name>.indices   (nnz,) int32, int64 when numel >= 2**31: flat row-major, strictly increasing
    <name>.bitmap    (8 * ceil(numel / 64),) uint8: bit i % 8 of byte i // 8 (the least significant
                     bit first) is 1 when flat index i is in the mask; zero beyond numel. Whole
                     8-byte words, so that every tensor of the file stays aligned

Metadata (safetensors' `__metadata__`, strings):

    format       "subnet_mask"
    version      "1"
    parameters   JSON {name: {"shape": [...], "nnz": n, "checksum": hex, "changed": {rule: n}}} of
                 every targeted floating-point parameter, those with nnz 0 included; checksum and
                 changed are optional
    base_model, rule, source, ...   origin, all optional

`checksum` is BLAKE2b with an 8-byte digest, in hex, over the base's values at the indices, in
their order, as little-endian bfloat16: fp32 and bf16 copies of one base agree.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from safetensors import SafetensorError, safe_open

from subnet_ft.errors import MaskFormatError
from subnet_ft.mask import SubnetMask
from subnet_ft.storage.codec import KINDS, Checksum, checksum, decode_indices, encode_indices
from subnet_ft.storage.safetensors_writer import SafetensorsWriter, header_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checksum", "checksum", "decode_indices", "encode_indices", "load_mask", "save_mask"]

FORMAT = "subnet_mask"
VERSION = "1"


def save_mask(mask: SubnetMask, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a mask file: whole, or not at all.

    Args:
        mask: what to write; a lazy one is read parameter by parameter.
        path: where.
        overwrite: whether an existing file is replaced.

    Raises:
        ConfigError: the file exists and `overwrite` is false.
    """
    records = {name: parameter_record(mask, name) for name in mask.shapes}
    metadata = file_metadata(mask.metadata, records)
    with SafetensorsWriter(path, header_bound(records, metadata), overwrite=overwrite) as writer:
        writer.metadata = metadata
        for name in storage_order(mask.shapes):
            if name in mask:
                kind, tensor = encode_indices(mask[name], math.prod(mask.shapes[name]))
                writer.add(f"{name}.{kind}", tensor)


def parameter_record(mask: SubnetMask, name: str) -> dict[str, Any]:
    """Return a parameter's entry of `parameters`."""
    record: dict[str, Any] = {"shape": list(mask.shapes[name]), "nnz": mask.counts[name]}
    if name in mask.checksums:
        record["checksum"] = mask.checksums[name]
    if name in mask.changed:
        record["changed"] = dict(mask.changed[name])
    return record


def file_metadata(
    metadata: Mapping[str, str], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Return the string metadata of a mask file."""
    reserved = {"format": FORMAT, "version": VERSION, "parameters": json.dumps(records)}
    return {**metadata, **reserved}


def header_bound(names: Iterable[str], metadata: Mapping[str, str]) -> int:
    """Return room enough for the header of a mask file with these parameters."""
    return header_bytes((f"{name}.indices" for name in names), metadata)


def storage_order(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Order parameters so that every tensor is aligned: int64 indices go before int32 ones."""
    return sorted(shapes, key=lambda name: math.prod(shapes[name]) < 2**31)


def load_mask(path: str | os.PathLike[str]) -> SubnetMask:
    """Open a mask file as a lazy view; only the header is read and validated now.

    Args:
        path: a mask file.

    Raises:
        MaskFormatError: names the file and the key that is wrong; raised now for the header, when
            a parameter is asked for for its indices.
    """
    return open_mask(path)


def open_mask(path: str | os.PathLike[str], *, temporary: bool = False) -> SubnetMask:
    """Do what `load_mask` does; a temporary file is deleted with the last mask that reads it."""
    path = Path(path).absolute()
    try:
        with safe_open(path, "np") as file:
            metadata = dict(file.metadata() or {})
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise MaskFormatError(
            f"{path}: expected a mask file (safetensors), got {str(error).splitlines()[0]}; "
            "make one with `subnet-ft extract`."
        ) from error
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        if metadata.get(key) != expected:
            raise MaskFormatError(
                f"{path}: metadata {key!r} must be {expected!r}, got {metadata.get(key)!r}; "
                "make the file with `subnet-ft extract`."
            )
    records = parse_records(str(path), metadata.get("parameters", ""))
    source = _FileIndices(path, records, _stored_keys(path, records, stored))
    if temporary:
        weakref.finalize(source, path.unlink, missing_ok=True)
    origin = {k: v for k, v in metadata.items() if k not in ("format", "version", "parameters")}
    return SubnetMask.from_source(
        source,
        {name: record["nnz"] for name, record in records.items()},
        {name: tuple(record["shape"]) for name, record in records.items()},
        checksums={n: r["checksum"] for n, r in records.items() if "checksum" in r},
        metadata=origin,
        changed={n: r["changed"] for n, r in records.items() if "changed" in r},
        path=None if temporary else path,
    )


def parse_records(where: str, text: str | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Parse and check `parameters`: name -> {"shape", "nnz", "checksum"?, "changed"?}.

    Args:
        where: what errors name: the file.
        text: the JSON, or what it parses to.

    Raises:
        MaskFormatError: names the first parameter whose entry is wrong.
    """
    try:
        records = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise MaskFormatError(
            f"{where}: metadata 'parameters' must be JSON, got {error}; write the file again."
        ) from error
    if not isinstance(records, Mapping):
        raise MaskFormatError(
            f"{where}: 'parameters' must be an object, got {type(records).__name__}; "
            "write the file again."
        )
    for name, record in records.items():
        if not _valid_record(record):
            raise MaskFormatError(
                f"{where}: parameter {name!r} must have a shape, an nnz within it and at most a "
                f"checksum and counts, got {json.dumps(record)[:200]}; write the file again."
            )
    return {name: _without_null(record) for name, record in records.items()}


def _without_null(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def _valid_record(record: Any) -> bool:
    if not isinstance(record, Mapping):
        return False
    shape, nnz = record.get("shape"), record.get("nnz")
    changed = record.get("changed", {})
    return (
        isinstance(shape, list)
        and all(_is_count(size) for size in shape)
        and _is_count(nnz)
        and nnz <= math.prod(shape)
        and isinstance(record.get("checksum") or "", str)
        and isinstance(changed, Mapping)
        and all(_is_count(count) for count in changed.values())
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stored_keys(
    path: Path, records: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Map each parameter with indices to its kind; every tensor must belong to one of them."""
    kinds: dict[str, str] = {}
    for name, record in records.items():
        present = [kind for kind in KINDS if f"{name}.{kind}" in stored]
        if len(present) != bool(record["nnz"]):
            raise MaskFormatError(
                f"{path}: parameter {name!r} has nnz {record['nnz']}, expected "
                f"{int(bool(record['nnz']))} tensor for it, found {present}; write the file again."
            )
        if present == ["indices"] and stored[f"{name}.indices"] != (record["nnz"],):
            raise MaskFormatError(
                f"{path}: {name}.indices must have shape ({record['nnz']},), got "
                f"{stored[f'{name}.indices']}; write the file again."
            )
        if present:
            kinds[name] = present[0]
    extra = set(stored) - {f"{name}.{kind}" for name, kind in kinds.items()}
    if extra:
        raise MaskFormatError(
            f"{path}: tensor {min(extra)!r} belongs to no parameter; write the file again."
        )
    return kinds


class _FileIndices(Mapping[str, "Tensor"]):
    """Indices that are read from the file, decoded and checked each time they are asked for."""

    def __init__(
        self, path: Path, records: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]
    ) -> None:
        self._path, self._records, self._kinds = path, records, kinds

    def __getitem__(self, name: str) -> Tensor:
        record, key = self._records[name], f"{name}.{self._kinds[name]}"
        try:
            with safe_open(self._path, "pt") as file:
                tensor = file.get_tensor(key)
            indices = decode_indices(self._kinds[name], tensor, math.prod(record["shape"]))
        except (SafetensorError, OSError, MaskFormatError) as error:
            raise MaskFormatError(f"{self._path}: {key}: {error}") from error
        if len(indices) != record["nnz"]:
            raise MaskFormatError(
                f"{self._path}: {key} must hold nnz = {record['nnz']} indices, got "
                f"{len(indices)}; write the file again."
            )
        return indices

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)
