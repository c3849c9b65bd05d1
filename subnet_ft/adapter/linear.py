"""A linear layer whose weight gradient is computed at the masked entries alone.

The ordinary way, `binding.Bind`, lets autograd compute the dense gradient and gathers from it. Here
the layer's own backward computes the compact gradient from what the layer took in and what came
back: the dense gradient never exists. It sums in another order, so results equal the ordinary way's
only up to rounding.
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


class EntryLinear(torch.autograd.Function):
    """A linear layer that computes the gradient of its weight at the live entries alone.

    Inputs' and compact gradients come at once: an optimizer may step the values, and with them the
    weight, as soon as they have theirs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        sidecar: Any,
        *values: torch.Tensor,
    ) -> torch.Tensor:
        """Compute ``inputs @ weight.T + bias``.

        Args:
            ctx: Autograd's context.
            inputs: (tokens, cols).
            weight: (rows, cols), holds ``values``. None: ``sidecar.dense`` makes it, here and again
                for backward.
            bias: (rows,) or None.
            sidecar: The `SubnetLayer` whose live adapters ``values`` are.
            *values: (nnz,) each.
        """
        dense = sidecar.dense(inputs.dtype) if weight is None else weight
        output = nn.functional.linear(inputs, dense, bias)
        ctx.sidecar, ctx.mark, ctx.dtype = sidecar, sidecar.mark(), inputs.dtype
        learns = any(ctx.needs_input_grad[4:])
        # Under autocast the product rounded its inputs to the output's dtype.
        ctx.save_for_backward(inputs.to(output.dtype) if learns else None, weight)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of inputs, bias and values.

        Raises:
            StaleGraphError: The weight holds other values than when the forward pass used it.
        """
        (gradient,) = gradients
        inputs, weight = ctx.saved_tensors
        subnets = ctx.sidecar.recall(ctx.mark)
        for_inputs = for_bias = None
        if ctx.needs_input_grad[0]:
            dense = ctx.sidecar.dense(ctx.dtype, subnets) if weight is None else weight
            for_inputs = (gradient @ dense.to(gradient.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(0)
        compact = entry_gradients(subnets, ctx.needs_input_grad[4:], gradient, inputs)
        return for_inputs, None, for_bias, None, *compact


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


def is_linear(cls: type) -> bool:
    """Tell whether a module of this class computes what ``nn.Linear`` does."""
    return issubclass(cls, nn.Linear) and cls.forward is nn.Linear.forward


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype a product with this weight is computed in: autocast's, else its own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def linear_forward(owner: nn.Linear, inputs: torch.Tensor, sidecar: "SubnetLayer") -> torch.Tensor:
    """Run a masked linear layer on its bare weight.

    Args:
        owner: The layer; its bias may be masked too, and goes the ordinary way.
        inputs: (..., cols).
        sidecar: Its weight's.
    """
    weight: torch.Tensor = owner.__dict__["_parameters"]["weight"]
    sidecar.check_weight(weight)
    return run(inputs, weight.data, owner.bias, sidecar)


def run(
    inputs: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    sidecar: "SubnetLayer",
) -> torch.Tensor:
    """Do `EntryLinear` on inputs of any number of dimensions, with a sidecar's live values."""
    values = [subnet.values for subnet in sidecar.live_subnets]
    flat = inputs.reshape(-1, inputs.shape[-1])
    output: torch.Tensor = EntryLinear.apply(flat, weight, bias, sidecar, *values)
    return output.view(*inputs.shape[:-1], output.shape[-1])  # of no tokens as well
