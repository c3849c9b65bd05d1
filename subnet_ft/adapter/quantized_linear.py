"""What a quantized linear layer computes under a subnetwork, and how its values get gradients.

Neither kind keeps a dense weight between forward and backward, or makes its dense gradient.

4-bit (`linear.MaskedLinear`): the weight is dequantized into a temporary, the values are written
over their entries there, and the product is a plain one: bit for bit the merged model's layer.
Backward makes the same temporary again.

LLM.int8: the layer rounds its inputs to int8 as well. Its own product stays, and what the values
change is added: y = layer(x) + x @ (values - dequantized).T, some rows of the latter at a time. At
the start that is the layer's own output. The merged weight is exact; its output differs by what
rounding the inputs does.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subnet_ft.adapter.gradients import entry_gradients

if TYPE_CHECKING:
    from subnet_ft.adapter.layer import SubnetLayer
    from subnet_ft.adapter.quantized_layer import EightBitLayer, QuantizedLayer


class AddedDelta(torch.autograd.Function):
    """Adds what the live values change to the output of a layer that does not know them."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        sidecar: "EightBitLayer",
        *values: torch.Tensor,
    ) -> torch.Tensor:
        """Compute ``output + inputs @ delta.T``.

        Args:
            ctx: Autograd's context.
            output: (tokens, rows) of the layer.
            inputs: (tokens, cols) in the same dtype.
            sidecar: Whose live adapters ``values`` are.
            *values: (nnz,) each.
        """
        ctx.sidecar, ctx.mark = sidecar, sidecar.mark()
        ctx.save_for_backward(inputs)
        result = output.clone()
        for rows, delta in sidecar.delta(inputs.dtype, sidecar.live):
            result[:, rows] += inputs @ delta.t()
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Pass the output's gradient on, and compute the inputs' and the compact ones.

        Raises:
            StaleGraphError: The layer holds other values than when the forward pass used it.
        """
        (gradient,) = gradients
        (inputs,) = ctx.saved_tensors
        subnets = ctx.sidecar.recall(ctx.mark)
        for_inputs = None
        if ctx.needs_input_grad[1]:
            for_inputs = torch.zeros_like(inputs)
            for rows, delta in ctx.sidecar.delta(gradient.dtype, ctx.mark[0]):
                for_inputs += gradient[:, rows] @ delta
        compact = entry_gradients(subnets, ctx.needs_input_grad[3:], gradient, inputs)
        return gradient, for_inputs, None, *compact


def quantized_forward(
    owner: Any,
    inputs: torch.Tensor,
    weight: "QuantizedLayer | None",
    bias: "SubnetLayer | None",
) -> torch.Tensor:
    """Run a quantized linear layer of which weight or bias are masked.

    Args:
        owner: The layer, of a class made by `binding.bind_owner`.
        inputs: (..., cols).
        weight: The weight's sidecar.
        bias: The bias's.
    """

    def own(inputs: torch.Tensor) -> torch.Tensor:
        # It casts a bias of another dtype in place: a masked one stands aside.
        dtype = getattr(owner, "compute_dtype", None) or inputs.dtype
        aside = owner.bias if bias is not None and owner.bias.dtype != dtype else None
        if aside is not None:
            owner._parameters["bias"] = nn.Parameter(aside.data, requires_grad=False)
        try:
            output: torch.Tensor = super(type(owner), owner).forward(inputs)
        finally:
            if aside is not None:
                owner._parameters["bias"] = aside
        return output

    if weight is None or not weight.live:
        output = own(inputs)
    else:
        output = weight.linear(owner, own, inputs)
    if bias is not None and torch.is_grad_enabled():
        bound = bias.bind(owner.bias)
        # The bias is in the output already: this adds zero, for the gradient alone, which
        # bitsandbytes gives a wrong shape.
        output = output + (bound - bound.detach()).to(output.dtype)
    return output
