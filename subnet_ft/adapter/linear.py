"""A linear layer whose weight gradient is computed at the masked entries alone.

The ordinary way, `binding.Bind`, lets autograd compute the dense gradient and gathers from it. Here
the layer runs on the bare weight, and an edge beside it computes the compact gradient from what the
layer took in and what came back: the dense gradient never exists. It sums in another order, so
results equal the ordinary way's only up to rounding.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subnet_ft import ops
from subnet_kernels.reference_weight_grad import CHUNK

if TYPE_CHECKING:
    from subnet_ft.adapter.layer import SubnetLayer
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


class WeightGrad(torch.autograd.Function):
    """Forward: a linear layer's output as it is. Backward: inputs, output's gradient -> compact."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        sidecar: "SubnetLayer",
        *values: torch.Tensor,
    ) -> torch.Tensor:
        """Attach ``values`` to ``output``.

        Args:
            ctx: Autograd's context.
            output: (..., rows) of the layer.
            inputs: (..., cols) of the layer.
            sidecar: Whose live adapters ``values`` are.
            *values: (nnz,) each.
        """
        ctx.sidecar, ctx.mark = sidecar, sidecar.mark()
        # Under autocast the layer rounded its inputs to the output's dtype.
        ctx.save_for_backward(inputs.to(output.dtype))
        ctx.mark_dirty(output)  # itself, not a view: what follows may work in place
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Pass the output's gradient on, and compute the compact ones.

        Raises:
            StaleGraphError: The weight holds other values than when the forward pass used it.
        """
        (gradient,) = gradients
        (inputs,) = ctx.saved_tensors
        subnets = ctx.sidecar.recall(ctx.mark)
        compact = entry_gradients(subnets, ctx.needs_input_grad[3:], gradient, inputs)
        return gradient, None, None, *compact


def entry_gradients(
    subnets: Sequence["Subnet"],
    needed: Sequence[bool],
    gradient: torch.Tensor,
    inputs: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Compute a linear layer's compact gradients, None where not needed.

    Args:
        subnets: The entries.
        needed: Whose gradients are.
        gradient: (..., rows) of the layer's output.
        inputs: (..., cols) of the layer, in the same dtype.
    """
    dy = gradient.reshape(-1, gradient.shape[-1]).contiguous()
    x = inputs.reshape(-1, inputs.shape[-1]).contiguous()

    def compute(subnet: "Subnet") -> torch.Tensor:
        tiles = partial(subnet.tiles, dy.shape[1], x.shape[1])
        return ops.weight_grad(dy, x, subnet.indices, tiles).to(subnet.values.dtype)

    pairs = zip(subnets, needed, strict=True)
    return [compute(subnet) if wanted else None for subnet, wanted in pairs]


def is_linear(cls: type) -> bool:
    """Tell whether a module of this class computes what ``nn.Linear`` does."""
    return issubclass(cls, nn.Linear) and cls.forward is nn.Linear.forward


def linear_forward(owner: nn.Linear, inputs: torch.Tensor, sidecar: "SubnetLayer") -> torch.Tensor:
    """Run a masked linear layer on its bare weight.

    Args:
        owner: The layer; its bias may be masked too, and goes the ordinary way.
        inputs: (..., cols).
        sidecar: Its weight's.
    """
    weight = owner._parameters["weight"]
    assert weight is not None
    sidecar.check_weight(weight)
    output = nn.functional.linear(inputs, weight, owner.bias)
    values = [subnet.values for subnet in sidecar.live_subnets]
    result: torch.Tensor = WeightGrad.apply(output, inputs, sidecar, *values)
    return result
