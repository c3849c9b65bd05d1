"""Two encodings of which entries a mask keeps, and which of them is read faster.

Flat indices cost 4 bytes a kept entry (8 from 2**31 elements on). A bitmap costs 1 bit an element,
kept or not: bit i % 8 of byte i // 8, padded to 8 bytes as in a mask file. Beside it stands, for
each block of 1024 elements, how many entries are kept before it: with it a program finds its place
in the compact tensor without looking at the rest.

The dense and compact traffic is the same under both, so the fewer index bytes win: the bitmap where
4 * nnz > numel / 8 + 8 * numel / 1024, that is from a density of 3.3% on (1.7% with int64).
"""

from typing import NamedTuple

import torch
from torch import Tensor

TILE_COLS = 64  # columns an offset of `Tiles` covers; a program's tile has as many
BITMAP_BLOCK = 1024  # elements an offset covers; a program's block
STRETCH = (
    1 << 20
)  # bytes decoded at a time, so that the unpacked bits never take 8 times the bitmap


class Bitmap(NamedTuple):
    """The bitmap of a tensor of `numel` elements.

    `bits` is (8 * ceil(numel / 64),) uint8, `offsets` (ceil(numel / 1024),) int64: entries kept
    before each block.
    """

    bits: Tensor
    offsets: Tensor


class Tiles(NamedTuple):
    """A (rows, cols) matrix's bitmap, with offsets for each row of each tile.

    `bits` is as in `Bitmap`; `offsets` (rows * ceil(cols / 64) + 1,) int64: entries kept before
    each stretch of a row, row by row, and all of them. 0.25 bytes an element.
    """

    bits: Tensor
    offsets: Tensor


def bitmap_bytes(numel: int) -> int:
    """Return the bytes of a bitmap of `numel` elements, whole 8-byte words."""
    return (numel + 63) // 64 * 8


def choose_encoding(nnz: int, numel: int) -> str:
    """Return "bitmap" or "indices", whichever a kernel reads fewer bytes of.

    Args:
        nnz: entries kept.
        numel: elements of the dense tensor.
    """
    index_bytes = nnz * (4 if numel < 2**31 else 8)
    offset_bytes = -(-numel // BITMAP_BLOCK) * 8
    return "bitmap" if bitmap_bytes(numel) + offset_bytes < index_bytes else "indices"


def encode_bitmap(indices: Tensor, numel: int) -> Bitmap:
    """Encode flat indices as a bitmap.

    Args:
        indices: (nnz,) int32|int64, strictly increasing, below `numel`.
        numel: elements of the dense tensor.
    """
    size = bitmap_bytes(numel)
    bits = torch.zeros(size, dtype=torch.uint8, device=indices.device)
    # An entry is the only one with its bit in its byte, so adding is setting.
    bit = torch.bitwise_left_shift(torch.ones_like(indices), indices % 8).to(torch.uint8)
    bits.index_add_(0, indices // 8, bit)
    starts = torch.arange(0, numel, BITMAP_BLOCK, dtype=indices.dtype, device=indices.device)
    return Bitmap(bits, torch.searchsorted(indices, starts))


def encode_tiles(indices: Tensor, rows: int, cols: int) -> Tiles:
    """Encode flat indices for `weight_grad`.

    Args:
        indices: (nnz,) int32|int64, strictly increasing, below rows * cols.
        rows: of the weight.
        cols: of the weight.
    """
    device = indices.device
    first = torch.arange(0, cols, TILE_COLS, device=device)
    starts = (torch.arange(rows, device=device)[:, None] * cols + first).flatten()
    ends = torch.full((1,), rows * cols, device=device)
    offsets = torch.searchsorted(indices.long(), torch.cat([starts, ends]))
    return Tiles(encode_bitmap(indices, rows * cols).bits, offsets)


def decode_bitmap(bitmap: Bitmap) -> Tensor:
    """Return the (nnz,) int64 flat indices of a bitmap."""
    device = bitmap.bits.device
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    pieces = [torch.empty(0, dtype=torch.int64, device=device)]
    for start in range(0, bitmap.bits.numel(), STRETCH):
        bits = (bitmap.bits[start : start + STRETCH, None] >> shifts) & 1
        pieces.append(bits.flatten().nonzero().flatten() + start * 8)
    return torch.cat(pieces)
