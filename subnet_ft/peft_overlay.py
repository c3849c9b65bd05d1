"""A PEFT adapter laid over its base, as a checkpoint: what merging it would give, in slices.

LoRA follows PEFT 0.21's merge on CPU, operation by operation and dtype by dtype, so that the result
has the same bits; peft itself is not imported.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from subnet_ft.adapter_file import HEADER_KEYS, PREFIX, index_key, parse_header, values_key
from subnet_ft.checkpoints import Checkpoint, open_checkpoint, read_json
from subnet_ft.codec import KINDS, Checksum, decode_indices
from subnet_ft.errors import CheckpointError, MaskFormatError, MaskMismatchError, UnsupportedError
from subnet_ft.tensor_files import SafetensorsFile

_CHUNK = 1 << 22
# LoRA options whose merge is something else than W + scaling * B @ A.
_LORA_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
_LORA_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_LORA_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")


class Patch(Protocol):
    """What an adapter does to one base parameter."""

    def apply(self, weight: Tensor, start: int) -> None:
        """Change a flat slice of the base, which begins at element `start`, in place."""
        ...


class OverlayCheckpoint(Checkpoint):
    """A base with an adapter's changes; parameters without a patch are the base's.

    Args:
        source: what the user called the adapter.
        path: the adapter directory.
        base: what it lies over.
        patches: parameter name -> its change.
    """

    def __init__(
        self, source: str, path: Path, base: Checkpoint, patches: Mapping[str, Patch]
    ) -> None:
        """Check that every patch has a parameter."""
        self.source, self.path, self.base, self.patches = source, path, base, patches
        self.tensors, self.aliases = base.tensors, base.aliases
        self.skipped, self.config = base.skipped, base.config
        for name in patches:
            if name not in base.tensors:
                raise MaskMismatchError(
                    f"{source}: {name}: the adapter changes this parameter, {base.source} has no "
                    "such parameter of its own; use the base the adapter was trained on."
                )

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return elements [start, stop) after the change; see `Checkpoint.read`."""
        values = self.base.read(name, start, stop, out)
        if name in self.patches:
            self.patches[name].apply(values, start)
        return values


class _Replace:
    """A parameter the adapter stores whole (modules_to_save, or a copy of its base layer)."""

    def __init__(self, file: SafetensorsFile, key: str) -> None:
        self._file, self._key = file, key

    def apply(self, weight: Tensor, start: int) -> None:
        weight.copy_(self._file.read(self._key, start, start + weight.numel()))


class _Lora:
    """W + scaling * B @ A, after an optional replacement of W."""

    def __init__(
        self, file: SafetensorsFile, keys: Mapping[str, str], scaling: float, transposed: bool
    ) -> None:
        self._file, self._keys = file, keys
        self._scaling, self._transposed = scaling, transposed
        self._embedding = "lora_embedding_A" in keys
        self._delta: Tensor | None = None
        self.replace: _Replace | None = None

    def _factor(self, letter: str) -> Tensor:
        key = next(k for part, k in self._keys.items() if f"_{letter}" in part)
        shape = self._file.tensors[key].shape
        # PEFT upcasts adapters in half precision to fp32 when it loads them.
        return self._file.read(key, 0, math.prod(shape)).view(shape).float()

    def apply(self, weight: Tensor, start: int) -> None:
        if self.replace:
            self.replace.apply(weight, start)
        # The whole product, once per parameter: a product of slices may round otherwise. A pass
        # over the parameter begins at 0 and ends at its last element, where memory is let go.
        if self._delta is None:
            product = self._factor("B") @ self._factor("A")
            delta = (product.T if self._transposed else product) * self._scaling
            self._delta = delta.contiguous().view(-1)
        stop = start + weight.numel()
        delta = self._delta[start:stop]
        # PEFT rounds an embedding's delta to W's dtype first, but adds a Linear's in fp32.
        weight += delta.to(weight.dtype) if self._embedding else delta
        if stop == self._delta.numel():
            self._delta = None


class _Subnet:
    """Absolute values at indices; the base's values there must have the recorded checksum."""

    def __init__(
        self, file: SafetensorsFile, base: Checkpoint, name: str, record: Mapping[str, Any]
    ) -> None:
        self._file, self._base, self._name, self._record = file, base, name, record
        self._loaded: tuple[Tensor, Tensor] | None = None

    def _load(self) -> tuple[Tensor, Tensor]:
        """Return (nnz,) int64 indices and (nnz,) values, checked against the base."""
        numel = math.prod(self._record["shape"])
        kind = next(k for k in KINDS if index_key(self._name, k) in self._file.tensors)
        key = index_key(self._name, kind)
        stored = self._file.read(key, 0, self._file.tensors[key].numel)
        try:
            indices = decode_indices(kind, stored, numel).long()
        except MaskFormatError as error:
            raise MaskFormatError(f"{self._file.path}: {key}: {error}") from error
        nnz = self._record["nnz"]
        if len(indices) != nnz:
            raise MaskFormatError(
                f"{self._file.path}: {key} must hold nnz = {nnz} indices, got {len(indices)}; "
                "save the adapter again."
            )
        values = self._file.read(values_key(self._name), 0, nnz)
        expected = self._record.get("checksum")
        if expected and expected != _checksum_at(self._base, self._record["base_name"], indices):
            raise MaskMismatchError(
                f"{self._name}: the adapter was trained on other base values (checksum "
                f"{expected}) than {self._base.source} has; use the base it was trained on."
            )
        return indices, values

    def apply(self, weight: Tensor, start: int) -> None:
        if self._loaded is None:
            self._loaded = self._load()
        indices, values = self._loaded
        stop = start + weight.numel()
        first, last = torch.searchsorted(indices, torch.tensor([start, stop])).tolist()
        weight[indices[first:last] - start] = values[first:last].to(weight.dtype)
        if stop == math.prod(self._record["shape"]):
            self._loaded = None


def _checksum_at(base: Checkpoint, name: str, indices: Tensor) -> str:
    pieces = Checksum()
    for start in range(0, base.tensors[name].numel, _CHUNK):
        stop = min(start + _CHUNK, base.tensors[name].numel)
        first, last = torch.searchsorted(indices, torch.tensor([start, stop])).tolist()
        if first < last:
            pieces.update(base.read(name, start, stop)[indices[first:last] - start])
    return pieces.hexdigest()


def open_adapter(
    source: str, path: Path, base: str | os.PathLike[str] | Checkpoint | None = None
) -> OverlayCheckpoint:
    """Open an adapter directory over its base.

    Args:
        source: what the user called it.
        path: the directory.
        base: what to lay it over; the config's base_model_name_or_path when None.

    Raises:
        CheckpointError: a file is missing or damaged, or shapes disagree.
        MaskFormatError: our adapter's file breaks its format.
        MaskMismatchError: the base is not the one it was trained on.
        UnsupportedError: a kind of adapter that is not merged here.
    """
    config = read_json(path / "adapter_config.json")
    kind = config.get("peft_type")
    if kind not in ("LORA", "SUBNET_FT"):
        raise UnsupportedError(
            f"{source}: expected an adapter of type LORA or SUBNET_FT, found {kind}; merge it with "
            "PEFT first."
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            f"{source}: expected adapter_model.safetensors beside adapter_config.json, found none; "
            "save the adapter as safetensors."
        )
    file = SafetensorsFile(path / "adapter_model.safetensors")
    if base is None:
        base = config.get("base_model_name_or_path")
        if not base:
            raise CheckpointError(
                f"{source}: expected a base model, adapter_config.json names none; pass the base."
            )
    opened = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    patches = _lora(source, file, config, opened) if kind == "LORA" else _subnet(file, opened)
    return OverlayCheckpoint(source, path, opened, patches)


def _lora(
    source: str, file: SafetensorsFile, config: Mapping[str, Any], base: Checkpoint
) -> dict[str, Patch]:
    refused = [option for option in _LORA_REFUSED if config.get(option)]
    if config.get("bias", "none") != "none":
        refused.append("bias")
    if config.get("init_lora_weights") not in _LORA_INITS:
        refused.append("init_lora_weights")
    if refused:
        raise UnsupportedError(
            f"{source}: expected plain LoRA, found {refused[0]}={config[refused[0]]!r}; merge it "
            "with PEFT first."
        )
    factors: dict[str, dict[str, str]] = {}
    others = []
    for key in file.tensors:
        match = _LORA_KEY.fullmatch(key.removeprefix(PREFIX))
        if match:
            factors.setdefault(match[1], {})[match[2].removesuffix(".weight")] = key
        else:
            others.append(key)
    patches: dict[str, Patch] = _replacements(file, others, base)
    for module, keys in factors.items():
        name = base.aliases.get(f"{module}.weight", f"{module}.weight")
        lora = _lora_patch(source, file, module, keys, config, base.tensors.get(name))
        replaced = patches.get(name)
        if isinstance(replaced, _Lora):
            raise UnsupportedError(
                f"{source}: {name}: expected one LoRA per parameter, found two on tied weights; "
                "merge it with PEFT first."
            )
        lora.replace = replaced if isinstance(replaced, _Replace) else None
        patches[name] = lora
    return patches


def _lora_patch(
    source: str,
    file: SafetensorsFile,
    module: str,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    info: Any,
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


def _replacements(file: SafetensorsFile, keys: Iterable[str], base: Checkpoint) -> dict[str, Any]:
    patches = {}
    for key in keys:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name in base.aliases and key.endswith(".base_layer.weight"):
            continue  # the tied copy PEFT stores of a targeted embedding
        if name not in base.tensors:
            raise CheckpointError(
                f"{file.path}: {key}: expected a parameter of {base.source}, found none (tied, or "
                "not in the base); merge it with PEFT first."
            )
        if file.tensors[key].shape != base.tensors[name].shape:
            raise CheckpointError(
                f"{file.path}: {key}: expected shape {base.tensors[name].shape}, found "
                f"{file.tensors[key].shape}; use the base the adapter was trained on."
            )
        patches[name] = _Replace(file, key)
    return patches


def _subnet(file: SafetensorsFile, base: Checkpoint) -> dict[str, Patch]:
    header_key = next((key for key in HEADER_KEYS if key in file.tensors), None)
    if header_key is None:
        raise MaskFormatError(
            f"{file.path}: expected a tensor {HEADER_KEYS[0]}, found none; save the adapter again."
        )
    header = parse_header(file.read(header_key, 0, file.tensors[header_key].numel), str(file.path))
    patches: dict[str, Patch] = {}
    used = {header_key}
    for name, record in header["parameters"].items():
        if not record["nnz"]:
            continue
        shape = tuple(record["shape"])
        stored = [key for key in (values_key(name), *(index_key(name, k) for k in KINDS))
                  if key in file.tensors]  # fmt: skip
        values = file.tensors.get(values_key(name))
        if len(stored) != 2 or values is None or values.shape != (record["nnz"],):
            raise MaskFormatError(
                f"{file.path}: {name}: expected {record['nnz']} values and their indices, found "
                f"{stored}; save the adapter again."
            )
        name_in_base = base.aliases.get(name, name)
        found = base.tensors.get(name_in_base)
        if found is None or found.shape != shape:
            raise MaskMismatchError(
                f"{name}: the adapter was made for shape {shape}, {base.source} has "
                f"{found.shape if found else 'no such parameter'}; use the base it was trained on."
            )
        patches[name_in_base] = _Subnet(file, base, name, {**record, "base_name": name_in_base})
        used.update(stored)
    return {
        **_replacements(file, [key for key in file.tensors if key not in used], base),
        **patches,
    }
