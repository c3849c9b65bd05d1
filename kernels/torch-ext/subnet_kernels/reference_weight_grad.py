"""weight_grad in torch: a linear layer's weight gradient at the kept entries, in row chunks."""

from itertools import pairwise

import torch
from torch import Tensor

# Elements of the dense gradient that exist at a time: 4 MiB in fp32, far below a weight matrix
# worth masking, and still enough rows for a matrix product to run at its full speed.
CHUNK = 1 << 20


def weight_grad(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    tiles: object = None,
) -> Tensor:
    """Compute ``out[i] (+)= sum_t dy[t, r_i] * x[t, c_i]``, where entry i is at (r_i, c_i).

    The dense gradient ``dy.T @ x`` is made and dropped some rows at a time; rows without an entry
    are never made. Each chunk is in the dtype of ``dy``, as autograd's dense gradient would be.

    Args:
        dy: (tokens, rows) float32|bfloat16|float16, the gradient of the layer's output.
        x: (tokens, cols), same dtype, the layer's input.
        indices: (nnz,) int64|int32, flat positions in the (rows, cols) weight, strictly increasing.
        out: (nnz,) float32; allocated when absent.
        accumulate: Add to ``out`` instead of overwriting it.
        tiles: The kernel's; unused.

    Returns:
        ``out``.
    """
    rows, cols = dy.shape[1], x.shape[1]
    if out is None:
        out = torch.zeros(indices.numel(), dtype=torch.float32, device=dy.device)
    height = min(rows, max(1, CHUNK // cols))
    starts = torch.arange(0, rows + height, height, device=indices.device)
    places = torch.searchsorted(indices, starts * cols).tolist()
    buffer = torch.empty(height, cols, dtype=dy.dtype, device=dy.device)
    for i, (first, last) in enumerate(pairwise(places)):
        if first == last:
            continue
        row = i * height
        part = dy[:, row : row + height]
        chunk = torch.mm(part.t(), x, out=buffer[: part.shape[1]])
        entries = chunk.view(-1).index_select(0, indices[first:last] - row * cols)
        if accumulate:
            out[first:last].add_(entries)
        else:
            out[first:last].copy_(entries)
    return out
