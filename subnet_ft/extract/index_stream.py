"""One parameter's indices, written to the mask file while they are found."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from subnet_ft.storage.codec import bitmap_bytes, index_kind
from subnet_ft.storage.indices import index_name
from subnet_ft.storage.safetensors_writer import SafetensorsWriter, array_bytes

_COPY = 1 << 20


class IndexStream:
    """Write indices into the file, and a bitmap beside it, until it is clear which is smaller.

    Args:
        writer: the mask file.
        scratch: a file for the bitmap.
        name: the parameter.
        numel: its size.
    """

    def __init__(self, writer: SafetensorsWriter, scratch: BinaryIO, name: str, numel: int) -> None:
        """Start with no indices."""
        self.name, self.numel, self.nnz = name, numel, 0
        self._writer, self._scratch = writer, scratch
        self._scratch.seek(0)

    def add(self, bits: np.ndarray, where: np.ndarray, start: int) -> None:
        """Add a chunk.

        Args:
            bits: (elements,) bool: in the mask or not.
            where: (nnz,) int64: positions of the set bits.
            start: flat index of the chunk's first element, a multiple of 8.
        """
        self.nnz += len(where)
        if self._kind() == "indices":
            flat = (where + start).astype(index_name(self.numel), copy=False)
            self._writer.write(array_bytes(flat))
        self._scratch.write(np.packbits(bits, bitorder="little").data)

    def finish(self) -> None:
        """Make the smaller of the two a tensor of the file; nothing where no index was added."""
        if self._kind() == "indices":
            if self.nnz:
                self._writer.finish(f"{self.name}.indices", index_name(self.numel), (self.nnz,))
            return
        self._writer.rewind()
        size = self._scratch.tell()
        self._scratch.seek(0)
        for start in range(0, size, _COPY):
            self._writer.write(self._scratch.read(min(_COPY, size - start)))
        padded = bitmap_bytes(self.numel)
        self._writer.write(bytes(padded - size))
        self._writer.finish(f"{self.name}.bitmap", "uint8", (padded,))

    def _kind(self) -> str:
        return index_kind(self.nnz, self.numel)
