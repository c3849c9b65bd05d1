"""Flat indices of one parameter: 1-D, row-major, strictly increasing integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from subnet_ft.errors import MaskFormatError
from subnet_ft.storage.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def index_name(numel: int) -> str:
    """Return the name of the dtype that holds flat indices of a parameter of this size."""
    return "int32" if numel < 2**31 else "int64"


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of indices into a parameter: int32 while numel < 2**31, else int64."""
    dtype: torch.dtype = getattr(torch, index_name(numel))
    return dtype


def check_indices(name: str, indices: Tensor, numel: int) -> Tensor:
    """Return indices on the CPU in their dtype, or say in one line what is wrong with them.

    Args:
        name: what the error names.
        indices: (nnz,) integer.
        numel: size of the parameter they point into.

    Raises:
        MaskFormatError: not 1-D, not integers, outside [0, numel), or not strictly increasing.
    """
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    if indices.dim() != 1 or indices.dtype not in integers:
        found = f"{indices.dim()}-D {str(indices.dtype).removeprefix('torch.')}"
        raise MaskFormatError(f"{name}: indices must be 1-D integers, got {found}; flatten them.")
    if indices.numel():
        # Strictly increasing means that the ends are the extremes.
        if not bool((indices[1:] > indices[:-1]).all()):
            raise MaskFormatError(
                f"{name}: indices must be strictly increasing, got unsorted or repeated ones; "
                "pass torch.unique(indices)."
            )
        first, last = int(indices[0]), int(indices[-1])
        if first < 0 or last >= numel:
            raise MaskFormatError(
                f"{name}: indices must lie in [0, {numel}), got {first} to {last}; "
                "use flat row-major indices of this parameter."
            )
    return indices.to(device="cpu", dtype=index_dtype(numel))


def contains(indices: Tensor, queries: Tensor) -> Tensor:
    """Tell which of the queries are among the indices.

    Args:
        indices: (nnz,) int, strictly increasing.
        queries: (m,) of the same dtype.

    Returns:
        (m,) bool.
    """
    if not indices.numel():
        return torch.zeros(queries.shape, dtype=torch.bool)
    found = torch.searchsorted(indices, queries).clamp_(max=indices.numel() - 1)
    return indices[found] == queries


def union(a: Tensor, b: Tensor) -> Tensor:
    """Merge two strictly increasing 1-D tensors of one dtype into one."""
    return torch.cat([a, b[~contains(a, b)]]).sort().values


def spread(numel: int, nnz: int, generator: torch.Generator) -> Tensor:
    """Draw one index in each of ``nnz`` equal stretches of [0, numel), as (nnz,) int64."""
    edges = torch.arange(nnz + 1) * numel // max(nnz, 1)
    width = edges[1:] - edges[:-1]
    draw = torch.rand(nnz, generator=generator, dtype=torch.float64)
    return edges[:-1] + (draw * width).long()
