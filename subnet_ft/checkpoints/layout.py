"""What the tensors of a stored checkpoint are: parameters, buffers, tied, or unsupported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from subnet_ft.errors import UnsupportedError
from subnet_ft.storage.arrays import FLOATING, SAFETENSORS_NAMES
from subnet_ft.storage.tensor_files import BinFile, TensorFile, TensorInfo

_CHUNK = 1 << 22
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
               "tok_embeddings.weight", "embeddings.weight")  # fmt: skip
# Buffers that old checkpoints store although the model computes them.
_BUFFERS = re.compile(r".*(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.masked_bias|inv_freq)")
_QUANTIZED = re.compile(
    r".*\.(qweight|qzeros|g_idx|SCB|weight_format|weight_scale(_inv)?|weight_packed|absmax"
    r"|quant_map|nested_absmax|quant_state\..*)"
)


def not_a_parameter(source: str, key: str, info: TensorInfo) -> str | None:
    """Say why a stored tensor is no parameter, or raise for one that cannot be handled."""
    if _QUANTIZED.fullmatch(key):
        raise UnsupportedError(
            f"{source}: {key}: expected floating-point weights, found a quantized layout; use the "
            "unquantized checkpoint."
        )
    if _BUFFERS.fullmatch(key):
        return "a buffer the model computes"
    if info.dtype in FLOATING:
        return None
    if info.dtype not in SAFETENSORS_NAMES or key.endswith(".weight"):
        raise UnsupportedError(
            f"{source}: {key}: expected float32, float16 or bfloat16, got {info.dtype}; use the "
            "unquantized checkpoint."
        )
    return f"a buffer of dtype {info.dtype}"


def tied_aliases(
    parameters: Mapping[str, TensorInfo],
    locations: Mapping[str, TensorFile],
    config: Mapping[str, Any],
) -> dict[str, str]:
    """Map tied weights to the parameter that `named_parameters()` gives: the first of them."""
    text_config = config.get("text_config")
    nested = text_config if isinstance(text_config, Mapping) else {}
    tied = config.get("tie_word_embeddings", nested.get("tie_word_embeddings"))
    aliases: dict[str, str] = {}
    if tied is not False:
        # A `.bin` file knows: what is tied shares its storage.
        owners: dict[tuple[TensorFile, int, tuple[int, ...]], str] = {}
        for key, info in parameters.items():
            file = locations[key]
            if isinstance(file, BinFile):
                owner = owners.setdefault((file, file.storage(key), info.shape), key)
                if owner != key:
                    aliases[key] = owner
    if tied:
        embedding = next((key for key in parameters if _last_two(key) in _EMBEDDINGS), None)
        heads = [key for key in parameters if _last_two(key) == "lm_head.weight"]
        for head in heads or ["lm_head.weight"]:
            shape = parameters[head].shape if heads else None
            if embedding and (
                shape is None
                or (
                    shape == parameters[embedding].shape
                    and _same_data(locations[head], head, locations[embedding], embedding)
                )
            ):
                aliases[head] = embedding
    return aliases


def _same_data(a: TensorFile, a_key: str, b: TensorFile, b_key: str) -> bool:
    """Tell whether two stored tensors agree: transformers 5 does not tie a head that differs."""
    info = a.tensors[a_key]
    return info == b.tensors[b_key] and all(
        np.array_equal(
            a.read_array(a_key, start, stop).view(np.uint8),
            b.read_array(b_key, start, stop).view(np.uint8),
        )
        for start in range(0, info.numel, _CHUNK)
        for stop in [min(start + _CHUNK, info.numel)]
    )


def _last_two(key: str) -> str:
    return ".".join(key.split(".")[-2:])
