"""Torch twins of the operations over many tensors, with the kernels' signatures.

`table` is the kernels' cache of pointers; a twin has no use for it.
"""

from collections.abc import Sequence

from torch import Tensor

from . import reference


def gather_many(
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    outs: Sequence[Tensor],
    accumulate: bool = False,
    table: object = None,
) -> Sequence[Tensor]:
    """Gather from many tensors: `reference.gather` of each."""
    for dense, index, out in zip(denses, indices, outs, strict=True):
        reference.gather(dense, index, out, accumulate)
    return outs


def scatter_many_(
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    table: object = None,
) -> Sequence[Tensor]:
    """Scatter into many tensors: `reference.scatter_` of each."""
    for dense, index, value in zip(denses, indices, values, strict=True):
        reference.scatter_(dense, index, value)
    return denses
