"""LoRA laid over its base: the bits PEFT's merge on CPU gives.

Follows PEFT 0.21's `merge_and_unload`, operation by operation and dtype by dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from subnet_ft.adapter_file import PREFIX
from subnet_ft.checkpoints.base import Checkpoint
from subnet_ft.checkpoints.overlay import Change, Patch, Replacement, replacements
from subnet_ft.errors import CheckpointError, UnsupportedError
from subnet_ft.storage.tensor_files import SafetensorsFile, TensorInfo

# Options whose merge is something else than W + scaling * B @ A.
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")


class _Lora:
    """W + scaling * B @ A, after an optional replacement of W."""

    def __init__(
        self, file: SafetensorsFile, keys: Mapping[str, str], scaling: float, transposed: bool
    ) -> None:
        self._file, self._keys = file, keys
        self._scaling, self._transposed = scaling, transposed
        self._embedding = "lora_embedding_A" in keys
        self.replacement: Replacement | None = None

    def load(self) -> Change:
        # The whole product at once: a product of slices may round otherwise.
        product = self._factor("B") @ self._factor("A")
        whole = (product.T if self._transposed else product) * self._scaling
        flat = whole.contiguous().view(-1)

        def apply(weight: Tensor, start: int) -> None:
            if self.replacement:
                self.replacement.apply(weight, start)
            delta = flat[start : start + weight.numel()]
            # PEFT rounds an embedding's delta to W's dtype first, but adds a Linear's in fp32.
            weight += delta.to(weight.dtype) if self._embedding else delta

        return apply

    def _factor(self, letter: str) -> Tensor:
        key = next(k for part, k in self._keys.items() if part.endswith(f"_{letter}"))
        shape = self._file.tensors[key].shape
        # PEFT upcasts adapters in half precision to fp32 when it loads them.
        return self._file.read(key, 0, math.prod(shape)).view(shape).float()


def lora_patches(
    source: str, file: SafetensorsFile, config: Mapping[str, Any], base: Checkpoint
) -> dict[str, Patch]:
    """Return what a LoRA adapter does to each parameter.

    Args:
        source: what the user called the adapter.
        file: its adapter_model.safetensors.
        config: its adapter_config.json.
        base: what it lies over.

    Raises:
        CheckpointError: factors are missing or do not fit the base.
        UnsupportedError: a variant other than plain LoRA.
    """
    refused = [option for option in _REFUSED if config.get(option)]
    if config.get("bias", "none") != "none":
        refused.append("bias")
    if config.get("init_lora_weights") not in _INITS:
        refused.append("init_lora_weights")
    if refused:
        raise UnsupportedError(
            f"{source}: expected plain LoRA, found {refused[0]}={config[refused[0]]!r}; merge it "
            "with PEFT first."
        )
    factors: dict[str, dict[str, str]] = {}
    others = []
    for key in file.tensors:
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match:
            factors.setdefault(match[1], {})[match[2].removesuffix(".weight")] = key
        else:
            others.append(key)
    patches: dict[str, Patch] = {**replacements(file, others, base)}
    for module, keys in factors.items():
        name = base.aliases.get(f"{module}.weight", f"{module}.weight")
        lora = _lora_patch(source, file, module, keys, config, base.tensors.get(name))
        replaced = patches.get(name)
        if isinstance(replaced, _Lora):
            raise UnsupportedError(
                f"{source}: {name}: expected one LoRA per parameter, found two on tied weights; "
                "merge it with PEFT first."
            )
        lora.replacement = replaced if isinstance(replaced, Replacement) else None
        patches[name] = lora
    return patches


def _lora_patch(
    source: str,
    file: SafetensorsFile,
    module: str,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    info: TensorInfo | None,
) -> _Lora:
    embedding = "lora_embedding_A" in keys
    parts = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(keys) != set(parts):
        raise CheckpointError(
            f"{source}: {module}: expected {parts[0]} and {parts[1]}, found {', '.join(keys)}; "
            "save the adapter again."
        )
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    a, b = (file.tensors[keys[part]].shape for part in parts)
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    product = (b[0], a[1]) if len(a) == len(b) == 2 else (*b, *a)
    target = product[::-1] if transposed else product
    if info is not None and (info.shape != target or a[0] != rank):
        raise CheckpointError(
            f"{source}: {module}: expected factors of rank {rank} for a weight of shape "
            f"{info.shape}, found A {a} and B {b}; use the base the adapter was trained on."
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _Lora(file, keys, scaling, transposed)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Look up as PEFT does: the first pattern that matches the end of the module's path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
