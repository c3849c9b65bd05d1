"""What every checkpoint offers: named parameters, read in slices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subnet_ft.storage.arrays import to_tensor
from subnet_ft.storage.tensor_files import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint(ABC):
    """Named parameters that can be read in flat slices.

    Attributes:
        source: what the user called it.
        path: the directory (or file) it was found in.
        tensors: name -> shape and stored dtype of every floating-point parameter.
        aliases: name of a tied weight -> the parameter it is tied to.
        skipped: name of a stored tensor that is no parameter -> why.
        config: the parsed config.json, empty where there is none.
    """

    source: str
    path: Path
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    skipped: Mapping[str, str]
    config: Mapping[str, Any]

    @abstractmethod
    def read_array(
        self, name: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return elements [start, stop) of the flat parameter as an array; see `storage.arrays`.

        Args:
            name: a key of `tensors`.
            start: first element, row-major.
            stop: one past the last.
            out: (>= stop - start,) of `arrays.array_dtype`, reused as memory of the result.

        Raises:
            CheckpointError: the data cannot be read.
        """

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flat parameter.

        Args:
            name: a key of `tensors`.
            start: first element, row-major.
            stop: one past the last; None for the end.

        Returns:
            (stop - start,) in the stored dtype.

        Raises:
            CheckpointError: the data cannot be read.
        """
        info = self.tensors[name]
        return to_tensor(
            self.read_array(name, start, info.numel if stop is None else stop), info.dtype
        )
