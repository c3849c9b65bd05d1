"""Torch twins: oracle, CPU path and explanation of every kernel, with the kernels' signatures.

A compact tensor holds the ``nnz`` entries of a dense one that a mask keeps; ``indices`` are their
flat row-major positions, strictly increasing.
"""

import torch

# Entries moved at a time when a cast needs a temporary: 4 MiB of fp32, within any L2 cache's reach
# and far below the smallest weight matrix worth masking.
CHUNK = 1 << 20


def gather(
    dense: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Read a dense tensor at ``indices``: ``out[i] (+)= dense.flatten()[indices[i]]``.

    Args:
        dense: Any shape, floating point, contiguous.
        indices: (nnz,) int64 or int32, flat positions in ``dense``.
        out: (nnz,) any floating dtype; float32 is allocated when absent.
        accumulate: Add to ``out`` instead of overwriting it.

    Returns:
        ``out``.
    """
    flat = dense.reshape(-1)
    if out is None:
        out = torch.empty(indices.numel(), dtype=torch.float32, device=dense.device)
    if not accumulate and out.dtype == flat.dtype:
        return torch.take(flat, indices.long(), out=out)
    for start in range(0, indices.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        entries = flat.take(indices[part].long())
        if accumulate:
            out[part].add_(entries)
        else:
            out[part].copy_(entries)
    return out


def scatter_(dense: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write compact values into a dense tensor: ``dense.flatten()[indices[i]] = values[i]``.

    Values are rounded to the dense dtype, to nearest, ties to even. Nothing else is touched.

    Args:
        dense: Any shape, floating point, contiguous; changed in place at ``indices`` only.
        indices: (nnz,) int64, flat positions in ``dense``.
        values: (nnz,) any floating dtype.

    Returns:
        ``dense``.
    """
    flat = dense.view(-1)
    # Far apart, entries are written from several threads; close together, one is quick enough.
    sparse = indices.numel() * 10 < flat.numel()
    pieces = [(indices, values)]
    if values.dtype != flat.dtype and indices.numel() > CHUNK:
        pieces = list(zip(indices.split(CHUNK), values.split(CHUNK), strict=True))
    for index, value in pieces:
        if sparse:
            flat.index_put_((index,), value.to(flat.dtype))
        else:
            flat.index_copy_(0, index, value.to(flat.dtype))
    return dense
