"""gather and scatter_ over a bitmap, for densities above ~3%: see `encoding`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._jit import add, converted, find_work, pointer, rounded
from ._launch import FLOATS, Column, LaunchTable, launch
from ._tune import Config
from .encoding import BITMAP_BLOCK, Bitmap, bitmap_bytes

CONFIG = Config(BITMAP_BLOCK, 4)  # the encoding fixes the block


@triton.jit
def kept_of(
    row_ptr: tl.tensor, block: tl.tensor, start: tl.tensor, length: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return a block's elements, which of them are kept, and their places in the compact tensor."""
    bits_ptr = pointer(row_ptr, 1, tl.uint8)
    offsets_ptr = pointer(row_ptr, 2, tl.int64)
    offs = start + tl.arange(0, BLOCK)
    byte = tl.load(bits_ptr + (offs >> 3), mask=offs < length, other=0).to(tl.int32)
    bit = (byte >> (offs & 7).to(tl.int32)) & 1
    place = tl.load(offsets_ptr + block) + tl.associative_scan(bit, 0, add) - 1
    return offs, bit != 0, place


@triton.jit
def _gather_bitmap_kernel(
    table_ptr: tl.tensor,
    tensor_of_ptr: tl.tensor,
    DENSE: tl.constexpr,
    BITS: tl.constexpr,
    OFFSETS: tl.constexpr,
    OUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute ``out[place(i)] (+)= dense[i]`` for every kept element i of every tensor.

    Grid: one program for BLOCK = 1024 dense elements of one tensor. Table columns: dense, bits,
    offsets, out. Bytes an entry at density d: 0.13 / d (bits and offsets) + a 32-byte sector of
    dense, shared by its neighbours + 4 written (fp32 out), + 4 read when accumulating.
    Twin: ``reference_bitmap.gather_bitmap``.
    """
    row_ptr, block, start, length = find_work(table_ptr, tensor_of_ptr, 4, BLOCK)
    dense_ptr = pointer(row_ptr, 0, DENSE)
    out_ptr = pointer(row_ptr, 3, OUT)
    offs, kept, place = kept_of(row_ptr, block, start, length, BLOCK)
    entries = tl.load(dense_ptr + offs, mask=kept, other=0.0)
    if ACCUMULATE:
        old = tl.load(out_ptr + place, mask=kept, other=0.0)
        result = rounded(old.to(tl.float32) + entries.to(tl.float32), OUT)
    else:
        result = converted(entries, DENSE, OUT)
    tl.store(out_ptr + place, result, mask=kept)


@triton.jit
def _scatter_bitmap_kernel(
    table_ptr: tl.tensor,
    tensor_of_ptr: tl.tensor,
    DENSE: tl.constexpr,
    BITS: tl.constexpr,
    OFFSETS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute ``dense[i] = round(values[place(i)])`` for every kept element i of every tensor.

    Grid: one program for BLOCK = 1024 dense elements of one tensor. Table columns: dense, bits,
    offsets, values. Bytes an entry at density d: 0.13 / d (bits and offsets) + 4 read (fp32
    values); a 32-byte sector of dense read and written, shared by its neighbours.
    Twin: ``reference_bitmap.scatter_bitmap_``.
    """
    row_ptr, block, start, length = find_work(table_ptr, tensor_of_ptr, 4, BLOCK)
    dense_ptr = pointer(row_ptr, 0, DENSE)
    values_ptr = pointer(row_ptr, 3, VALUES)
    offs, kept, place = kept_of(row_ptr, block, start, length, BLOCK)
    values = tl.load(values_ptr + place, mask=kept, other=0.0)
    tl.store(dense_ptr + offs, converted(values, VALUES, DENSE), mask=kept)


def gather_bitmap(dense: Tensor, bitmap: Bitmap, out: Tensor, accumulate: bool = False) -> Tensor:
    """Read the kept entries of a dense tensor, in row-major order.

    Args:
        dense: any shape, float32|bfloat16|float16, contiguous.
        bitmap: which of its elements are kept.
        out: (nnz,) float32|bfloat16|float16, contiguous; its size is taken on trust.
        accumulate: Add to ``out`` instead of overwriting it.

    Returns:
        ``out``.

    Raises:
        ValueError: a dtype, size, stride or device is not as above.
    """
    gather_bitmap_many([dense], [bitmap], [out], accumulate)
    return out


def gather_bitmap_many(
    denses: Sequence[Tensor],
    bitmaps: Sequence[Bitmap],
    outs: Sequence[Tensor],
    accumulate: bool = False,
    table: LaunchTable | None = None,
) -> Sequence[Tensor]:
    """Do `gather_bitmap` of many tensors in one launch for each combination of dtypes."""
    columns, lengths = bitmap_columns("out", denses, bitmaps, outs)
    launch(_gather_bitmap_kernel, columns, lengths, table, config=CONFIG, ACCUMULATE=accumulate)
    return outs


def scatter_bitmap_(dense: Tensor, bitmap: Bitmap, values: Tensor) -> Tensor:
    """Write compact values into the kept entries of a dense tensor, rounded to nearest even.

    Args:
        dense: any shape, float32|bfloat16|float16, contiguous; changed at kept entries only.
        bitmap: which of its elements are kept.
        values: (nnz,) float32|bfloat16|float16, contiguous; its size is taken on trust.

    Returns:
        ``dense``.

    Raises:
        ValueError: a dtype, size, stride or device is not as above.
    """
    scatter_bitmap_many_([dense], [bitmap], [values])
    return dense


def scatter_bitmap_many_(
    denses: Sequence[Tensor],
    bitmaps: Sequence[Bitmap],
    values: Sequence[Tensor],
    table: LaunchTable | None = None,
) -> Sequence[Tensor]:
    """Do `scatter_bitmap_` of many tensors in one launch for each combination of dtypes."""
    columns, lengths = bitmap_columns("values", denses, bitmaps, values)
    launch(_scatter_bitmap_kernel, columns, lengths, table, config=CONFIG)
    return denses


def bitmap_columns(
    name: str, denses: Sequence[Tensor], bitmaps: Sequence[Bitmap], compacts: Sequence[Tensor]
) -> tuple[list[Column], list[int]]:
    """Return a launch's columns and lengths; `compacts` go by `name`."""
    numels = [dense.numel() for dense in denses]
    blocks = [-(-numel // BITMAP_BLOCK) for numel in numels]
    bits, offsets = [b.bits for b in bitmaps], [b.offsets for b in bitmaps]
    columns = [
        Column("dense", denses, [*FLOATS]),
        Column("bits", bits, [torch.uint8], [bitmap_bytes(numel) for numel in numels]),
        Column("offsets", offsets, [torch.int64], blocks),
        Column(name, compacts, [*FLOATS]),
    ]
    return columns, numels
