"""A safetensors file written front to back, whole or not at all, without holding its tensors.

safetensors.torch.save_file needs every tensor in memory. Here room for the header is reserved, the
data is streamed behind it, and the header is filled in last, padded with spaces (which the format
allows) to a multiple of 8.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from subnet_ft.errors import ConfigError
from subnet_ft.storage.arrays import SAFETENSORS_NAMES, array_dtype, to_array

if TYPE_CHECKING:
    from torch import Tensor

# More than any entry takes besides its name: a dtype, up to 8 sizes, two offsets.
_ENTRY_BYTES = 320


def header_bytes(keys: Iterable[str], metadata: Mapping[str, str]) -> int:
    """Return room enough for the header of a file with at most these tensors and metadata."""
    entries = sum(len(json.dumps(key)) + _ENTRY_BYTES for key in keys)
    return entries + len(json.dumps(dict(metadata))) + 64


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying them."""
    return array_bytes(to_array(tensor))


def array_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array without copying them."""
    if not array.size:  # no view as bytes exists
        return memoryview(b"")
    return array.reshape(-1).view(np.uint8).data


class SafetensorsWriter:
    """Write tensors one after another; the file appears under its name when the block ends well.

    Args:
        path: the file to make.
        reserve: room for the header in bytes, at least what it will take (`header_bytes`).
        overwrite: whether an existing file is replaced.

    Raises:
        ConfigError: the file exists and `overwrite` is false, or its directory is missing.

    Example:
        >>> with SafetensorsWriter(path, header_bytes(["a"], {})) as writer:  # doctest: +SKIP
        ...     writer.add("a", torch.zeros(2))
    """

    def __init__(
        self, path: str | os.PathLike[str], reserve: int, *, overwrite: bool = False
    ) -> None:
        """Check the target; nothing is written before the block is entered."""
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        check_target(self.path, overwrite)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._reserve = (reserve + 7) // 8 * 8
        self._entries: dict[str, Any] = {}
        self._start = 0
        self._size = 0
        self._file: BinaryIO

    def __enter__(self) -> SafetensorsWriter:
        """Open the temporary file."""
        self._file = self._temporary.open("wb")
        self._file.seek(8 + self._reserve)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the header and the name in place, or remove everything after an error."""
        try:
            if kind is None:
                self._write_header()
                self._file.close()
                self._temporary.replace(self.path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes to the tensor that the next `finish` names."""
        self._file.write(data)
        self._size += len(data)

    def rewind(self) -> None:
        """Drop what was written since the last `finish`."""
        self._size = 0
        self._file.seek(8 + self._reserve + self._start)
        self._file.truncate()

    def finish(self, key: str, dtype: str, shape: Sequence[int]) -> None:
        """Make the bytes written since the last `finish` a tensor of a dtype given by name."""
        expected = math.prod(shape) * array_dtype(dtype).itemsize
        assert self._size == expected, (key, self._size, shape)
        end = self._start + self._size
        self._entries[key] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [self._start, end],
        }
        self._start, self._size = end, 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Append a whole tensor."""
        self.write(tensor_bytes(tensor))
        self.finish(key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    def _write_header(self) -> None:
        entries = dict(self._entries)
        if self.metadata:
            entries = {"__metadata__": self.metadata, **entries}
        header = json.dumps(entries, separators=(",", ":")).encode()
        assert len(header) <= self._reserve, "reserve is an upper bound of the header"
        self._file.seek(0)
        self._file.write(self._reserve.to_bytes(8, "little") + header.ljust(self._reserve))


def check_target(path: Path, overwrite: bool = False) -> None:
    """Refuse a path that must not, or cannot, be written.

    Raises:
        ConfigError: it exists and `overwrite` is false, or its directory is missing.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise ConfigError(
            f"{path}: expected a path that does not exist, found one; "
            "choose another, remove it, or pass overwrite where there is one."
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"{path}: expected an existing directory to write into, found none; create it first."
        )
