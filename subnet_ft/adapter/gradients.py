"""Compact gradients, one for each adapter: gathered from a dense one, or computed by themselves."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from subnet_ft import ops
from subnet_kernels.reference_weight_grad import CHUNK

if TYPE_CHECKING:
    from subnet_ft.adapter.subnet import Subnet


def pays(shape: Sequence[int]) -> bool:
    """Tell whether computing a linear layer's gradient at its entries alone pays.

    It does where the weight has more elements than one chunk of the computation: then less exists
    at a time than a dense gradient, and by ``benchmarks/results/kernels_cpu.json`` it takes 0.6 to
    1.0 times as long at (8192, 2048), 1.01 to 1.09 times at (2048, 2048). Of a smaller weight the
    one chunk is the dense gradient, and the rest is a detour of up to 11%.

    Args:
        shape: (rows, cols) of the weight.
    """
    return math.prod(shape) > CHUNK


def gathered_gradients(
    subnets: Sequence["Subnet"],
    needed: Sequence[bool],
    gradient: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor | None]:
    """Gather a weight's dense gradient into compact ones, None where not needed.

    Args:
        subnets: The entries.
        needed: Whose gradients are.
        gradient: The dense one, in the product's dtype.
        dtype: The weight's; who looks at the dense gradient (`Subnet.watched`) sees it in this one.
    """
    if any(subnet.watched for subnet in subnets):
        gradient = gradient.to(dtype)
    compact: list[torch.Tensor | None] = []
    for subnet, wanted in zip(subnets, needed, strict=True):
        part = None
        if wanted and subnet.scout is not None:  # a mask is looked for: nothing trains yet
            subnet.scout(gradient)
        elif wanted:
            part = torch.empty_like(subnet.values)
            ops.gather(gradient, subnet.indices, part)
        if part is not None and subnet.offmask is not None:
            subnet.offmask.observe(gradient, part)
        if part is not None and not torch.compiler.is_compiling() and subnet.observer:
            subnet.observer(gradient, part)
        compact.append(part)
    return compact


def entry_gradients(
    subnets: Sequence["Subnet"],
    needed: Sequence[bool],
    gradient: torch.Tensor,
    inputs: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Compute a linear layer's compact gradients, None where not needed; no dense one exists.

    It sums in another order, so results equal the gathered ones only up to rounding.

    Args:
        subnets: The entries.
        needed: Whose gradients are.
        gradient: (tokens, rows) of the layer's output.
        inputs: (tokens, cols) of the layer, in the same dtype.
    """
    if not any(needed):
        return [None] * len(subnets)
    dy, x = gradient.contiguous(), inputs.contiguous()

    def compute(subnet: "Subnet") -> torch.Tensor:
        tiles = partial(subnet.tiles, dy.shape[1], x.shape[1])
        return ops.weight_grad(dy, x, subnet.indices, tiles).to(subnet.values.dtype)

    pairs = zip(subnets, needed, strict=True)
    return [compute(subnet) if wanted else None for subnet, wanted in pairs]
