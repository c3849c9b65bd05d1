"""Flat slices of tensors in one checkpoint file, safetensors or `.bin`, without loading it."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from subnet_ft.errors import CheckpointError
from subnet_ft.storage.arrays import SAFETENSORS_NAMES, array_dtype, to_array, to_tensor
from subnet_ft.storage.lazy import torch
from subnet_ft.storage.safetensors_writer import array_bytes

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {stored: name for name, stored in SAFETENSORS_NAMES.items()}


class TensorInfo(NamedTuple):
    """Shape and stored dtype of a tensor.

    The dtype is torch's name of it, or the file's own, such as "F8_E4M3", where this library does
    not handle it.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorFile(Protocol):
    """A file of named tensors."""

    path: Path
    tensors: dict[str, TensorInfo]

    def read_array(
        self, key: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return elements [start, stop) of the flat tensor as a (stop - start,) array.

        Args:
            key: name of the tensor in the file.
            start: first element, row-major.
            stop: one past the last element.
            out: (>= stop - start,) of `arrays.array_dtype`, reused as memory of the result.

        Raises:
            CheckpointError: the data cannot be read.
        """
        ...

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flat tensor as a (stop - start,) tensor."""
        return to_tensor(self.read_array(key, start, stop), self.tensors[key].dtype)


class SafetensorsFile(TensorFile):
    """A safetensors file, read with plain reads.

    Not memory-mapped: mapped pages would count as this process's memory, and grow with the model.

    Args:
        path: the file.

    Raises:
        CheckpointError: no such file, truncated, or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        """Validate the file and read its header."""
        self.path = path
        try:
            # The library's own checks: sizes, overlaps, file length.
            with safe_open(path, "np"):
                pass
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: expected a complete safetensors file, got {first_line(error)}; "
                "download or save it again."
            ) from error
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        header = json.loads(os.pread(self._fd, length, 8))
        header.pop("__metadata__", None)
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
            self.tensors[key] = TensorInfo(tuple(entry["shape"]), dtype)
            self._offsets[key] = 8 + length + entry["data_offsets"][0]

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read_array(
        self, key: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return elements [start, stop); see `TensorFile.read_array`."""
        dtype = array_dtype(self.tensors[key].dtype)
        values = np.empty(stop - start, dtype) if out is None else out[: stop - start]
        target = array_bytes(values)
        offset = self._offsets[key] + start * dtype.itemsize
        done = 0
        while done < len(target):
            count = os.preadv(self._fd, [target[done:]], offset + done)
            if not count:
                raise CheckpointError(
                    f"{self.path}: {key} ends early; the file was cut while it was read, "
                    "download or save it again."
                )
            done += count
        return values


class BinFile(TensorFile):
    """A `.bin` file of `torch.save`, memory-mapped; only tensors are ever unpickled.

    Args:
        path: the file.

    Raises:
        CheckpointError: no such file, or something other than a plain dictionary of tensors.
    """

    def __init__(self, path: Path) -> None:
        """Map the file."""
        self.path = path
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path}: expected a torch.save file of tensors only (zip format), got "
                f"{first_line(error)}; save it as safetensors."
            ) from error
        items = loaded.items() if isinstance(loaded, dict) else [(None, loaded)]
        if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in items):
            raise CheckpointError(
                f"{path}: expected a dictionary of tensors, got something else; "
                "save the model's state_dict."
            )
        self._loaded: dict[str, Tensor] = loaded
        self.tensors = {
            key: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for key, value in loaded.items()
        }

    def storage(self, key: str) -> int:
        """Return where a tensor begins in memory: the same for tensors that are tied."""
        return self._loaded[key].data_ptr()

    def read_array(
        self, key: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return elements [start, stop); see `TensorFile.read_array`."""
        values = to_array(self._loaded[key].reshape(-1)[start:stop])
        if out is None:
            return values.copy()
        out[: stop - start] = values
        return out[: stop - start]


def open_tensor_file(path: Path) -> TensorFile:
    """Open a `.safetensors` or `.bin` file.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file, found none; download it again.")
    return BinFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


def first_line(error: BaseException) -> str:
    """Return an error's message cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
