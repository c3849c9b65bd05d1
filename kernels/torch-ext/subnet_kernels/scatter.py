"""scatter_: compact values into the entries of dense tensors that a mask keeps."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._jit import converted, find_work, pointer
from ._launch import FLOATS, INDICES, Column, LaunchTable, launch


@triton.jit
def _scatter_kernel(
    table_ptr: tl.tensor,
    tensor_of_ptr: tl.tensor,
    DENSE: tl.constexpr,
    INDEX: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute ``dense[indices[i]] = round(values[i])`` for every tensor of a table.

    Grid: one program for BLOCK entries of one tensor. Table columns: dense, indices, values.
    Bytes an entry, fp32 values: 4 or 8 (index) + 4 read; a 32-byte sector of dense read and
    written, shared by its neighbours. Twin: ``reference.scatter_``,
    ``reference_multi.scatter_many_``.
    """
    row_ptr, _, start, length = find_work(table_ptr, tensor_of_ptr, 3, BLOCK)
    dense_ptr = pointer(row_ptr, 0, DENSE)
    indices_ptr = pointer(row_ptr, 1, INDEX)
    values_ptr = pointer(row_ptr, 2, VALUES)

    offs = start + tl.arange(0, BLOCK)
    inside = offs < length
    index = tl.load(indices_ptr + offs, mask=inside, other=0).to(tl.int64)
    values = tl.load(values_ptr + offs, mask=inside, other=0.0)
    tl.store(dense_ptr + index, converted(values, VALUES, DENSE), mask=inside)


def scatter_many_(
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    table: LaunchTable | None = None,
) -> Sequence[Tensor]:
    """Scatter into many tensors in one launch for each combination of dtypes.

    Args:
        denses: each of any shape, float32|bfloat16|float16, contiguous; changed in place.
        indices: each (nnz,) int32|int64, flat positions in the dense tensor, none twice.
        values: each (nnz,) float32|bfloat16|float16, contiguous.
        table: Keeps the pointers between calls; None builds them anew.

    Returns:
        ``denses``.

    Raises:
        ValueError: a dtype, size, stride or device is not as above.
    """
    nnz = [index.numel() for index in indices]
    columns = [
        Column("dense", denses, [*FLOATS]),
        Column("indices", indices, [*INDICES]),
        Column("values", values, [*FLOATS], nnz),
    ]
    launch(_scatter_kernel, columns, nnz, table)
    return denses


def scatter_(dense: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Write compact values into a dense tensor: ``dense.flatten()[indices[i]] = values[i]``.

    Values are rounded to the dense dtype, to nearest, ties to even. Nothing else is touched.

    Args:
        dense: any shape, float32|bfloat16|float16, contiguous; changed at ``indices`` only.
        indices: (nnz,) int32|int64, flat positions in ``dense``, none twice.
        values: (nnz,) float32|bfloat16|float16, contiguous.

    Returns:
        ``dense``.

    Raises:
        ValueError: a dtype, size, stride or device is not as above.
    """
    scatter_many_([dense], [indices], [values])
    return dense
