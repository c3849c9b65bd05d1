"""Dtypes by name, and weights as NumPy arrays: what streams in without importing torch.

Torch takes two seconds to import, more than it takes to compare two small models. NumPy has no
bfloat16: here a ``uint16`` array holds its bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Torch's name of a dtype -> the name in a safetensors header, and the array that holds it.
SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
FLOATING = ("float64", "float32", "float16", "bfloat16")
_INFINITY = {"uint16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def array_dtype(name: str) -> np.dtype[Any]:
    """Return the array dtype that holds a torch dtype, given by name."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def to_tensor(array: np.ndarray, name: str) -> Tensor:
    """Return an array as a tensor of the named dtype, sharing memory."""
    import torch

    tensor = torch.from_numpy(array.view(np.int16) if name == "bfloat16" else array)
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a CPU tensor as an array, sharing memory where it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().view(-1)
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round to bfloat16, to nearest, ties to even.

    Args:
        values: (n,) float64, float32, float16, or uint16 that already holds bfloat16; no NaN.

    Returns:
        (n,) uint16.
    """
    if values.dtype == np.uint16:
        return values
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    return rounded.astype(np.uint16)


def widen(values: np.ndarray) -> np.ndarray:
    """Return the values as float32 (float64 is rounded)."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def integers(values: np.ndarray) -> np.ndarray:
    """Return the bits of 2- or 4-byte values as unsigned integers."""
    return values.view({2: np.uint16, 4: np.uint32}[values.itemsize])


def has_nan(values: np.ndarray) -> bool:
    """Tell whether a NaN is among 2- or 4-byte values."""
    bits = integers(values)
    magnitude = np.iinfo(bits.dtype).max >> 1
    return bool(len(bits) and (bits & magnitude).max() > _INFINITY[values.dtype.name])
