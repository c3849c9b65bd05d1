"""bitsandbytes' quantized weights: which they are, and what weights they stand for.

A packed weight cannot be edited: its entries share a scale, and quantizing again changes others.
Classes are told by name, so that nothing here needs bitsandbytes until a weight of its is met.
"""

from copy import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from subnet_ft.errors import UnsupportedError

FOUR_BIT, EIGHT_BIT = "Params4bit", "Int8Params"
_LINEAR = {FOUR_BIT: "Linear4bit", EIGHT_BIT: "Linear8bitLt"}
_PACKS = "support_avx512bf16_for_cpu"  # of Linear4bit
_PACKED_BEFORE = "_subnet_packs"


def kind_of(module: nn.Module, leaf: str) -> str | None:
    """Tell how a parameter is quantized.

    Returns:
        `FOUR_BIT` (NF4, FP4), `EIGHT_BIT` (LLM.int8), or None: not by bitsandbytes.
    """
    name = type(module._parameters[leaf]).__name__
    return name if name in _LINEAR else None


def has_quantized(root: nn.Module) -> bool:
    """Tell whether any of a model's weights is quantized by bitsandbytes."""
    return any(kind_of(module, leaf) for module in root.modules() for leaf in module._parameters)


def is_quantized_linear(cls: type) -> bool:
    """Tell whether modules of this class are bitsandbytes' linear layers."""
    return any(
        base.__name__ in _LINEAR.values() and base.__module__.startswith("bitsandbytes.")
        for base in cls.__mro__
    )


def weight_shape(module: nn.Module, leaf: str) -> tuple[int, ...]:
    """Return the shape a parameter has, or has unpacked."""
    if kind_of(module, leaf) and is_quantized_linear(type(module)):
        linear: Any = module
        return linear.out_features, linear.in_features
    parameter = module._parameters[leaf]
    assert parameter is not None
    return tuple(parameter.shape)


def entries_dtype(module: nn.Module) -> torch.dtype:
    """Return what a quantized weight's originals have: what its layer computes in, else fp32."""
    fixed = getattr(module, "compute_dtype", None)
    return fixed if isinstance(fixed, torch.dtype) else torch.float32


def dequantize(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a quantized linear layer's weight, (out, in) in ``dtype``, as its forward pass has it.

    Args:
        module: ``Linear4bit`` or ``Linear8bitLt``.
        dtype: float32, bfloat16 or float16.
    """
    import bitsandbytes

    weight = module._parameters["weight"]
    if type(weight).__name__ == FOUR_BIT:
        state = copy(weight.quant_state)
        state.dtype = dtype
        dense: torch.Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, state)
    else:
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        dense = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scale).to(dtype)
    return dense


def check_quantized(name: str, module: nn.Module) -> None:
    """Refuse a quantized weight that cannot be masked.

    Raises:
        UnsupportedError: It is no linear layer's, a Conv1D's, not quantized yet, quantized anew in
            each forward pass, offloaded, or packed for inference.
    """
    weight: Any = module._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    if not is_quantized_linear(type(module)):
        problem = f"one of {type(module).__name__}; exclude it"
    elif getattr(module, "source_cls", None) is Conv1D:
        problem = "a Conv1D's, which bitsandbytes keeps transposed; exclude it or load in bf16"
    elif getattr(weight, "has_fp16_weights", False):
        problem = "has_fp16_weights=True, quantized at each use; load it without, or in bf16"
    elif weight.is_meta:
        problem = "one on the meta device; load it without offloading"
    elif weight.is_floating_point() and state is None:
        problem = "one that is not quantized yet; move the model to its device first"
    elif getattr(state, "packing_format_for_cpu", False):
        problem = (
            "one that bitsandbytes packed for inference on this CPU when it ran in eval mode, "
            "which rounds its scales; load the base again"
        )
    else:
        return
    raise UnsupportedError(f"{name}: expected a quantized linear layer's weight, found {problem}")


def refuse_other_quantization(root: nn.Module) -> None:
    """Refuse a model quantized by anything but bitsandbytes.

    Raises:
        UnsupportedError: It is.
    """
    method = getattr(root, "quantization_method", None)
    method = getattr(method, "value", method)
    if method not in (None, "bitsandbytes"):
        raise UnsupportedError(
            f"expected a base in fp32, bf16 or fp16, or quantized by bitsandbytes, found {method}; "
            "load it in one of those"
        )


def keep_unpacked(root: nn.Module) -> None:
    """Have no 4-bit layer packed for inference while an adapter is attached.

    In eval mode on a CPU with AVX512-BF16 bitsandbytes 0.50 packs the weight anew, for good: scales
    are rounded to bf16, and no gradient passes the layer any more, in training mode neither.
    """
    for module in root.modules():
        if module.__dict__.get(_PACKS):
            module.__dict__[_PACKED_BEFORE] = module.__dict__[_PACKS]
            module.__dict__[_PACKS] = False


def allow_packing(root: nn.Module) -> None:
    """Undo `keep_unpacked`."""
    for module in root.modules():
        if _PACKED_BEFORE in module.__dict__:
            module.__dict__[_PACKS] = module.__dict__.pop(_PACKED_BEFORE)
