"""How a mask file and an adapter file store indices, and the checksum of the values under them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from subnet_ft.errors import MaskFormatError
from subnet_ft.storage.arrays import array_dtype, bf16_bits, to_array
from subnet_ft.storage.indices import check_indices, index_dtype, index_name
from subnet_ft.storage.lazy import torch
from subnet_ft.storage.safetensors_writer import array_bytes

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("indices", "bitmap")


class Checksum:
    """Checksum of values that arrive in pieces.

    Example:
        >>> pieces = Checksum()
        >>> pieces.update(np.ones(2)), pieces.update(np.ones(1))
        (None, None)
        >>> pieces.hexdigest() == checksum(torch.ones(3))
        True
    """

    def __init__(self) -> None:
        """Start with no values."""
        self._hash = hashlib.blake2b(digest_size=8)

    def update(self, values: np.ndarray) -> None:
        """Add values: (n,) floating point, or uint16 that holds bfloat16 (see `arrays`)."""
        self._hash.update(array_bytes(bf16_bits(values)))

    def hexdigest(self) -> str:
        """Return 16 hex digits."""
        return self._hash.hexdigest()


def checksum(values: Tensor) -> str:
    """Return the checksum of a base's values at a mask's indices, as 16 hex digits.

    Args:
        values: (nnz,) floating point; hashed as bfloat16.
    """
    pieces = Checksum()
    pieces.update(to_array(values.cpu().to(torch.bfloat16)))
    return pieces.hexdigest()


def bitmap_bytes(numel: int) -> int:
    """Return the size of a bitmap: whole 8-byte words."""
    return (numel + 63) // 64 * 8


def index_kind(nnz: int, numel: int) -> str:
    """Return "indices" or "bitmap", whichever takes fewer bytes for this many indices."""
    width = array_dtype(index_name(numel)).itemsize
    return "indices" if nnz * width <= bitmap_bytes(numel) else "bitmap"


def encode_indices(indices: Tensor, numel: int) -> tuple[str, Tensor]:
    """Encode indices the smaller way.

    Args:
        indices: (nnz,) int32 or int64, strictly increasing, within [0, numel).
        numel: size of the parameter.

    Returns:
        ("indices", (nnz,) int32 or int64) or ("bitmap", (8 * ceil(numel / 64),) uint8).
    """
    kind = index_kind(indices.numel(), numel)
    if kind == "indices":
        return kind, indices.to(index_dtype(numel)).contiguous()
    bits = np.zeros(bitmap_bytes(numel) * 8, dtype=np.bool_)
    bits[indices.numpy()] = True
    return kind, torch.from_numpy(np.packbits(bits, bitorder="little"))


def decode_indices(kind: str, tensor: Tensor, numel: int) -> Tensor:
    """Decode what `encode_indices` made, and check it: it may come from anywhere.

    Args:
        kind: "indices" or "bitmap".
        tensor: as in `encode_indices`.
        numel: size of the parameter.

    Returns:
        (nnz,) int32, or int64 when numel >= 2**31, strictly increasing.

    Raises:
        MaskFormatError: the tensor is not of this kind, or points outside the parameter.
    """
    if kind == "indices":
        return check_indices("indices", tensor, numel)
    if kind != "bitmap":
        raise MaskFormatError(f"kind must be one of {KINDS}, got {kind!r}; use encode_indices.")
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != (bitmap_bytes(numel),):
        raise MaskFormatError(
            f"bitmap must be uint8 of shape ({bitmap_bytes(numel)},), got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}; write the mask again."
        )
    packed = tensor.cpu().contiguous().numpy()
    dtype = index_dtype(numel)
    # In stretches, so that the unpacked bits never take 8 times the bitmap.
    stretch = 1 << 20
    pieces = []
    for start in range(0, len(packed), stretch):
        bits = np.unpackbits(packed[start : start + stretch], bitorder="little").view(np.bool_)
        found = torch.from_numpy(np.flatnonzero(bits))
        pieces.append(found.add_(start * 8).to(dtype))
    indices = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype)
    return check_indices("bitmap", indices, numel)
