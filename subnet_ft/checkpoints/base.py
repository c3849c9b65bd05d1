"""What every checkpoint offers: named parameters, read in slices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from subnet_ft.storage.tensor_files import TensorInfo


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
    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return elements [start, stop) of the flat parameter.

        Args:
            name: a key of `tensors`.
            start: first element, row-major.
            stop: one past the last; None for the end.
            out: (>= stop - start,) of the stored dtype, reused as memory of the result.

        Returns:
            (stop - start,) in the stored dtype.

        Raises:
            CheckpointError: the data cannot be read.
        """
