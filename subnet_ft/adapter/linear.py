"""A linear layer that does its own backward pass, where that spares memory over autograd's.

The ordinary way is `binding.Bind`: autograd computes the product's gradients, and keeps what the
product took in until then. Two things can be spared:

- Under autocast, a copy of every weight in the product's dtype, half of the model again. Here it is
  made for the product, thrown away, and made again in backward, bit for bit the same.
- The dense gradient, with ``weight_grad="compact"``; see `gradients.entry_gradients`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subnet_ft.adapter.gradients import entry_gradients, gathered_gradients

if TYPE_CHECKING:
    from subnet_ft.adapter.layer import SubnetLayer


class MaskedLinear(torch.autograd.Function):
    """A linear layer that keeps its inputs for backward, and no copy of its weight.

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
        """Compute ``inputs @ weight.T + bias``, in autocast's dtype under autocast.

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
        rounded = inputs.to(product_dtype(inputs))
        output = nn.functional.linear(rounded, dense, bias)
        ctx.sidecar, ctx.mark, ctx.dtype = sidecar, sidecar.mark(), inputs.dtype
        ctx.compact = sidecar.computes_weight_grad
        learns = any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(rounded if learns else None, weight)
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
        needed = ctx.needs_input_grad[4:]
        if ctx.compact:
            compact = entry_gradients(subnets, needed, gradient, inputs)
        elif any(needed):
            compact = gathered_gradients(subnets, needed, gradient.t() @ inputs, weight.dtype)
        else:
            compact = [None] * len(needed)
        return for_inputs, None, for_bias, None, *compact


def is_linear(cls: type) -> bool:
    """Tell whether a module of this class computes what ``nn.Linear`` does."""
    return issubclass(cls, nn.Linear) and cls.forward is nn.Linear.forward


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype a product with this tensor is computed in: autocast's, else its own."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype  # autocast leaves doubles alone
    return torch.get_autocast_dtype(device)


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
    """Do `MaskedLinear` on inputs of any number of dimensions, with a sidecar's live values."""
    values = [subnet.values for subnet in sidecar.live_subnets]
    flat = inputs.reshape(-1, inputs.shape[-1])
    output: torch.Tensor = MaskedLinear.apply(flat, weight, bias, sidecar, *values)
    return output.view(*inputs.shape[:-1], output.shape[-1])  # of no tokens as well
