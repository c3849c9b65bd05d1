"""A checkpoint read in fp32, whatever it is stored in."""

from __future__ import annotations

import numpy as np

from subnet_ft.checkpoints.base import Checkpoint
from subnet_ft.storage.arrays import widen
from subnet_ft.storage.tensor_files import TensorInfo


class WidenedCheckpoint(Checkpoint):
    """Reads as float32; an adapter laid over it is not rounded to the stored dtype.

    Args:
        stored: the checkpoint itself.
    """

    def __init__(self, stored: Checkpoint) -> None:
        """Take over everything but the dtypes."""
        self.stored = stored
        self.source, self.path = stored.source, stored.path
        self.aliases, self.skipped, self.config = stored.aliases, stored.skipped, stored.config
        self.tensors = {n: TensorInfo(info.shape, "float32") for n, info in stored.tensors.items()}

    def read_array(
        self, name: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return elements [start, stop) in float32; see `Checkpoint.read_array`."""
        if self.stored.tensors[name].dtype == "float32":
            return self.stored.read_array(name, start, stop, out)
        return widen(self.stored.read_array(name, start, stop))
