"""How live values get into the weights, and entries out of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from subnet_ft import ops

if TYPE_CHECKING:
    from subnet_ft.adapter.layer import SubnetLayer
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


def flush_all(layers: Sequence["SubnetLayer"]) -> None:
    """Do `SubnetLayer.flush` of many layers, in one pass over all of their weights."""
    single = [layer for layer in layers if len(layer.live_subnets) == 1]
    subnets = [layer.live_subnets[0] for layer in single]
    ops.scatter_many_(
        [layer.weight.data for layer in single],
        [subnet.indices for subnet in subnets],
        [subnet.values.detach() for subnet in subnets],
    )
    for layer in layers:
        if len(layer.live) > 1:
            layer._write(layer.live)
        layer.count_write()


def compose(weight: torch.Tensor, subnets: Sequence["Subnet"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum several adapters: original + sum of (values - original), in fp32, over the union.

    Args:
        weight: Any shape; must hold the originals.
        subnets: The adapters' entries.

    Returns:
        (indices, values): (nnz_union,) int64 and float32.
    """
    indices, position = torch.cat([s.indices for s in subnets]).unique(return_inverse=True)
    values = ops.gather(weight, indices)
    deltas = torch.cat([s.values.detach().float() - s.originals.float() for s in subnets])
    return indices, values.index_add_(0, position, deltas)
