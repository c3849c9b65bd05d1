"""How live values get into the weights, and entries out of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from subnet_ft import ops

if TYPE_CHECKING:
    from subnet_ft.adapter.live import LiveWeight
    from subnet_ft.adapter.subnet import Subnet


def read_entries(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather ``weight.flatten()[indices]`` in the weight's own dtype.

    Args:
        weight: Any shape, contiguous.
        indices: (nnz,) int64.

    Returns:
        (nnz,) in the weight's dtype.
    """
    out = torch.empty(indices.numel(), dtype=weight.dtype, device=weight.device)
    return ops.gather(weight, indices, out)


def flush_all(layers: Sequence["LiveWeight"]) -> None:
    """Do `LiveWeight.flush` of many layers, in one pass over all of their weights."""
    single = [layer for layer in layers if layer.in_place and len(layer.live_subnets) == 1]
    subnets = [layer.live_subnets[0] for layer in single]
    ops.scatter_many_(
        [layer.weight.data for layer in single],
        [subnet.indices for subnet in subnets],
        [subnet.values.detach() for subnet in subnets],
    )
    for layer in layers:
        if len(layer.live) > 1:
            layer._write(layer.live)
        layer.settle()  # else values changed by hand while they are off would never be written
        layer.count_write()


def compose(
    subnets: Sequence["Subnet"], weights: Sequence[float] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum several adapters: original + sum of weight * (values - original), over the union.

    In fp32, one adapter after the other. What a single adapter has with weight 1 stays its value,
    to the bit.

    Args:
        subnets: The adapters' entries of one parameter.
        weights: One for each; 1 by default.

    Returns:
        (indices, originals, values): (nnz_union,) each; int64, the parameter's dtype and float32.
    """
    weights = [1.0] * len(subnets) if weights is None else weights
    indices, position, uses = torch.cat([s.indices for s in subnets]).unique(
        return_inverse=True, return_counts=True
    )
    theirs = torch.cat([s.originals for s in subnets])
    originals = theirs.new_empty(indices.numel()).index_copy_(0, position, theirs)
    values = torch.cat([s.values.detach().float() for s in subnets])
    deltas, alone = values - theirs.float(), uses[position] == 1
    counts = [s.indices.numel() for s in subnets]
    for delta, kept, weight in zip(deltas.split(counts), alone.split(counts), weights, strict=True):
        if weight != 1:
            delta.mul_(weight)
            kept.zero_()
    summed = originals.to(torch.float32, copy=True).index_add_(0, position, deltas)
    return indices, originals, summed.index_copy_(0, position[alone], values[alone])
