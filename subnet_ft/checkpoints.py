"""Streamed tensors of any Hugging Face checkpoint, under the names `named_parameters()` gives.

A source is a model directory (one file or shards, safetensors or `.bin`), a Trainer checkpoint
directory, a hub id, or a PEFT adapter directory over its base (`peft_overlay`). Neither
transformers nor peft is imported, and nothing but tensors is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnet_ft.errors import CheckpointError, UnsupportedError
from subnet_ft.tensor_files import BinFile, TensorFile, TensorInfo, first_line, open_tensor_file

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                 "pytorch_model.bin", "pytorch_model.bin.index.json")  # fmt: skip
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
               "tok_embeddings.weight", "embeddings.weight")  # fmt: skip
# Buffers that old checkpoints store although the model computes them.
_BUFFERS = re.compile(r".*(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.masked_bias|inv_freq)")
_QUANTIZED = re.compile(
    r".*\.(qweight|qzeros|g_idx|SCB|weight_format|weight_scale(_inv)?|weight_packed|absmax"
    r"|quant_map|nested_absmax|quant_state\..*)"
)
_EXPERT = re.compile(r".*\.experts\.\d+\..*")


class Checkpoint(ABC):
    """Named parameters that can be read in flat slices.

    Attributes:
        source: what the user called it.
        path: the directory (or file) it was found in.
        tensors: name -> shape and stored dtype of every floating-point parameter.
        aliases: name of a tied weight -> the parameter it is tied to.
        skipped: name of a stored tensor that is no parameter -> why.
        config: the parsed config.json, empty where there is none.
    """

    source: str
    path: Path
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    skipped: Mapping[str, str]
    config: Mapping[str, Any]

    @abstractmethod
    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return elements [start, stop) of the flat parameter.

        Args:
            name: a key of `tensors`.
            start: first element, row-major.
            stop: one past the last; None for the end.
            out: (>= stop - start,) of the stored dtype, reused as memory of the result.

        Returns:
            (stop - start,) in the stored dtype.

        Raises:
            CheckpointError: the data cannot be read.
        """


class StoredCheckpoint(Checkpoint):
    """A checkpoint whose files hold the weights themselves.

    Args:
        source: what the user called it.
        path: model directory or a single weight file.

    Raises:
        CheckpointError: no weights, a missing or damaged file, or a layout that is refused.
        UnsupportedError: quantized weights, or a dtype this library does not handle.
    """

    def __init__(self, source: str, path: Path) -> None:
        """Open every file and find what its tensors are."""
        self.source, self.path = source, path
        self.files = _open_files(source, path)
        self.config = read_json(path / "config.json") if path.is_dir() else {}
        if self.config.get("quantization_config"):
            raise UnsupportedError(
                f"{source}: expected floating-point weights, config.json has a "
                "quantization_config; use the unquantized checkpoint."
            )
        locations: dict[str, TensorFile] = {}
        for file in self.files:
            for key in file.tensors:
                if key in locations:
                    raise CheckpointError(
                        f"{source}: {key} must be stored once, found in {locations[key].path.name} "
                        f"and {file.path.name}; save the model again."
                    )
                locations[key] = file
        self._locations = locations
        self.skipped = {}
        parameters = {}
        for key, file in locations.items():
            info = file.tensors[key]
            reason = _not_a_parameter(source, key, info)
            if reason:
                self.skipped[key] = reason
            else:
                parameters[key] = info
        self.aliases = _aliases(parameters, locations, self.config)
        self.tensors = {k: info for k, info in parameters.items() if k not in self.aliases}
        if not self.tensors:
            raise CheckpointError(
                f"{source}: expected floating-point parameters, found none; save the model again."
            )

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return elements [start, stop); see `Checkpoint.read`."""
        end = self.tensors[name].numel if stop is None else stop
        return self._locations[name].read(name, start, end, out)


def open_checkpoint(
    source: str | os.PathLike[str], base: str | os.PathLike[str] | Checkpoint | None = None
) -> Checkpoint:
    """Open a checkpoint wherever it comes from.

    Args:
        source: model directory, Trainer checkpoint directory, weight file, adapter directory, or a
            hub id "owner/name".
        base: for an adapter, the base to lay it over; its config's base when None.

    Raises:
        CheckpointError: nothing usable there; the line names what is missing or damaged.
        MaskMismatchError: our adapter, over another base than it was trained on.
        UnsupportedError: quantized weights or a kind of adapter this library does not merge.

    Example:
        >>> checkpoint = open_checkpoint("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
        >>> checkpoint.read("model.norm.weight", 0, 4)  # doctest: +SKIP
    """
    text = os.fspath(source)
    path = resolve(text)
    if not (path / "adapter_config.json").is_file():
        return StoredCheckpoint(text, path)
    from subnet_ft.peft_overlay import open_adapter

    return open_adapter(text, path, base)


def resolve(source: str) -> Path:
    """Return the local path of a source, downloading a hub id first.

    Raises:
        CheckpointError: no such path, or the download failed.
    """
    path = Path(source)
    if path.exists():
        return path.absolute()
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise CheckpointError(
            f"{source}: expected a checkpoint directory or a hub id owner/name, found no such "
            "path; check the spelling."
        )
    # The hub client is imported only where a download is wanted: it is slow to import.
    from huggingface_hub import snapshot_download

    try:
        folder = _download(snapshot_download, source, "*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = _download(snapshot_download, source, "*.bin")
    except Exception as error:  # the client's errors share no base class
        raise CheckpointError(
            f"{source}: expected a local path or a model on the Hub, got {first_line(error)}; "
            "check the name and the network."
        ) from error
    return folder


def _download(snapshot_download: Callable[..., str], source: str, weights: str) -> Path:
    """Fetch weights of one kind, configuration and tokenizer, from the top directory only."""
    patterns = [weights, "*.json", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected JSON, got {first_line(error)}; download or save it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _open_files(source: str, path: Path) -> list[TensorFile]:
    if path.is_file():
        return [open_tensor_file(path)]
    found = next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{source}: expected one of {', '.join(_WEIGHT_FILES)} or an adapter_config.json, "
            "found none; save the model with save_pretrained."
        )
    if found.suffix != ".json":
        return [open_tensor_file(found)]
    weight_map = read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{found}: expected a weight_map, found none; download it again.")
    files = []
    for shard in dict.fromkeys(weight_map.values()):
        # A file of the same directory: the index is not trusted to lead elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{found}: expected shard file names, got {shard!r}; fix it.")
        if not (path / shard).is_file():
            raise CheckpointError(
                f"{path / shard}: expected this shard (listed in {found.name}), found none; "
                "download it again."
            )
        files.append(open_tensor_file(path / shard))
    stored = {key: file.path.name for file in files for key in file.tensors}
    for key in [*weight_map, *stored]:
        if weight_map.get(key) != stored.get(key):
            raise CheckpointError(
                f"{found}: {key} must be in {weight_map.get(key, 'no shard')}, found in "
                f"{stored.get(key, 'none')}; download or save the checkpoint again."
            )
    return files


def _not_a_parameter(source: str, key: str, info: TensorInfo) -> str | None:
    """Say why a stored tensor is no parameter, or raise for one that cannot be handled."""
    if _EXPERT.fullmatch(key):
        raise UnsupportedError(
            f"{source}: {key}: expected fused experts as transformers 5 names them, found one "
            "tensor per expert (the version 4 layout); load and save it with transformers 5."
        )
    if _QUANTIZED.fullmatch(key):
        raise UnsupportedError(
            f"{source}: {key}: expected floating-point weights, found a quantized layout; use the "
            "unquantized checkpoint."
        )
    if _BUFFERS.fullmatch(key):
        return "a buffer the model computes"
    if info.dtype in _FLOATING:
        return None
    dtype = str(info.dtype).removeprefix("torch.")
    if isinstance(info.dtype, str) or key.endswith(".weight"):
        raise UnsupportedError(
            f"{source}: {key}: expected float32, float16 or bfloat16, got {dtype}; use the "
            "unquantized checkpoint."
        )
    return f"a buffer of dtype {dtype}"


def _aliases(
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
            if embedding and shape in (None, parameters[embedding].shape):
                aliases[head] = embedding
    return aliases


def _last_two(key: str) -> str:
    return ".".join(key.split(".")[-2:])
