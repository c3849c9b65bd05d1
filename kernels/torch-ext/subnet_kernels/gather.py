"""gather: the entries of dense tensors that a mask keeps, into compact ones."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._jit import converted, find_work, pointer, rounded
from ._launch import FLOATS, INDICES, Column, LaunchTable, launch


@triton.jit
def _gather_kernel(
    table_ptr: tl.tensor,
    tensor_of_ptr: tl.tensor,
    DENSE: tl.constexpr,
    INDEX: tl.constexpr,
    OUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute ``out[i] (+)= dense[indices[i]]`` for every tensor of a table.

    Grid: one program for BLOCK entries of one tensor. Table columns: dense, indices, out.
    Bytes an entry, fp32 out: 4 or 8 (index) + a 32-byte sector of dense, shared by its neighbours
    (so at most the element size / density) + 4 written, + 4 read when accumulating.
    Twin: ``reference.gather``, ``reference_multi.gather_many``.
    """
    row_ptr, _, start, length = find_work(table_ptr, tensor_of_ptr, 3, BLOCK)
    dense_ptr = pointer(row_ptr, 0, DENSE)
    indices_ptr = pointer(row_ptr, 1, INDEX)
    out_ptr = pointer(row_ptr, 2, OUT)

    offs = start + tl.arange(0, BLOCK)
    inside = offs < length
    index = tl.load(indices_ptr + offs, mask=inside, other=0).to(tl.int64)
    entries = tl.load(dense_ptr + index, mask=inside, other=0.0)
    if ACCUMULATE:
        old = tl.load(out_ptr + offs, mask=inside, other=0.0)
        result = rounded(old.to(tl.float32) + entries.to(tl.float32), OUT)
    else:
        result = converted(entries, DENSE, OUT)
    tl.store(out_ptr + offs, result, mask=inside)


def gather_many(
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    outs: Sequence[Tensor],
    accumulate: bool = False,
    table: LaunchTable | None = None,
) -> Sequence[Tensor]:
    """Gather from many tensors in one launch for each combination of dtypes.

    Args:
        denses: each of any shape, float32|bfloat16|float16, contiguous.
        indices: each (nnz,) int32|int64, flat positions in the dense tensor.
        outs: each (nnz,) float32|bfloat16|float16, contiguous.
        accumulate: Add to ``outs``, in fp32 with one rounding, instead of overwriting them.
        table: Keeps the pointers between calls; None builds them anew.

    Returns:
        ``outs``.

    Raises:
        ValueError: a dtype, size, stride or device is not as above.
    """
    nnz = [index.numel() for index in indices]
    columns = [
        Column("dense", denses, [*FLOATS]),
        Column("indices", indices, [*INDICES]),
        Column("out", outs, [*FLOATS], nnz),
    ]
    launch(_gather_kernel, columns, nnz, table, ACCUMULATE=accumulate)
    return outs


def gather(
    dense: Tensor, indices: Tensor, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Read a dense tensor at ``indices``: ``out[i] (+)= dense.flatten()[indices[i]]``.

    Args:
        dense: any shape, float32|bfloat16|float16, contiguous.
        indices: (nnz,) int32|int64, flat positions in ``dense``.
        out: (nnz,) float32|bfloat16|float16; float32 is allocated when absent.
        accumulate: Add to ``out`` instead of overwriting it.

    Returns:
        ``out``.

    Raises:
        ValueError: a dtype, size, stride or device is not as above.
    """
    if out is None:
        if accumulate:
            raise ValueError("accumulate: expected an out tensor to add to, got None.")
        out = torch.empty(indices.numel(), dtype=torch.float32, device=dense.device)
    gather_many([dense], [indices], [out], accumulate)
    return out
