"""From a quantized model with values beside it to an ordinary one with the values in it.

Nothing is quantized again: that would round the values, and change entries outside the mask.
"""

import logging
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import nn

from subnet_ft.adapter.layer import SubnetLayer
from subnet_ft.adapter.quantized import dequantize, is_quantized_linear
from subnet_ft.adapter.quantized_layer import QuantizedLayer

logger = logging.getLogger(__name__)


def to_full_precision(root: Any, layers: Iterable[SubnetLayer]) -> None:
    """Make every quantized linear layer an ``nn.Linear``, one at a time, masked or not.

    All of the model gets one dtype, the widest of those its 4-bit layers compute in and its other
    parameters have: nothing is rounded that the forward pass does not round.

    Args:
        root: The base model, its sidecars detached.
        layers: Those sidecars. The live values of quantized weights become entries of the weights;
            if none of them is of a quantized weight, the model is left as it is.
    """
    sidecars = {
        id(owner): layer
        for layer in layers
        if isinstance(layer, QuantizedLayer)
        for owner, _ in layer.owners
    }
    if not sidecars:
        return
    dtype = _widest(root)
    made: dict[int, nn.Linear] = {}
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if is_quantized_linear(type(module)):
            key = id(module)
            if key not in made:
                made[key] = _linear(module, sidecars.get(key), dtype)
            root.set_submodule(name, made[key])
    if getattr(root, "hf_quantizer", None) is not None:
        root.hf_quantizer.remove_quantization_config(root)
        root.is_loaded_in_4bit = root.is_loaded_in_8bit = False
        root.config.dtype = dtype
    for parameter in root.parameters():  # buffers stay: rotary frequencies are fp32 in any model
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    logger.info("merged into a model of %s, which is no longer quantized", dtype)


def _widest(root: nn.Module) -> torch.dtype:
    found = []
    for module in root.modules():
        if is_quantized_linear(type(module)):
            found += [getattr(module, "compute_dtype", None)]
        else:
            found += [p.dtype for p in module._parameters.values() if p is not None]
    floats = [dtype for dtype in found if dtype is not None and dtype.is_floating_point]
    return reduce(torch.promote_types, floats, floats[0]) if floats else torch.float32


def _linear(module: Any, sidecar: QuantizedLayer | None, dtype: torch.dtype) -> nn.Linear:
    own = getattr(module, "compute_dtype", None) or dtype  # as its forward pass rounds
    weight = dequantize(module, own) if sidecar is None else sidecar.dense(own)
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.bias = module.bias
    linear.train(module.training)
    if hasattr(module, "_hf_hook"):  # moves inputs to the layer's device
        add_hook_to_module(linear, module._hf_hook)
    return linear
