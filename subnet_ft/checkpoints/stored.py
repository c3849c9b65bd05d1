"""Streamed tensors of any Hugging Face checkpoint, under the names `named_parameters()` gives.

A source is a model directory (one file or shards, safetensors or `.bin`), a Trainer checkpoint
directory, a hub id, or a PEFT adapter directory over its base (`adapter`). Neither
transformers nor peft is imported, and nothing but tensors is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from subnet_ft.checkpoints.base import Checkpoint
from subnet_ft.checkpoints.composite import model_names
from subnet_ft.checkpoints.experts import stack_experts
from subnet_ft.checkpoints.layout import not_a_parameter, tied_aliases
from subnet_ft.errors import CheckpointError, UnsupportedError
from subnet_ft.storage.tensor_files import (
    TensorFile,
    first_line,
    open_tensor_file,
)

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                 "pytorch_model.bin", "pytorch_model.bin.index.json")  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class StoredCheckpoint(Checkpoint):
    """A checkpoint whose files hold the weights themselves.

    `places` says where in which parameter a stored tensor lies, where that is not under its own
    name; see `experts` and `composite`.

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
            reason = not_a_parameter(source, key, info)
            if reason:
                self.skipped[key] = reason
            else:
                parameters[key] = info
        name_of = model_names(self.config)
        aliases = tied_aliases(parameters, locations, self.config)
        self.aliases = {name_of(key): name_of(owner) for key, owner in aliases.items()}
        stacked = stack_experts(source, parameters, locations, name_of)
        parameters, self._stacks, self.places = stacked
        self.tensors = {k: info for k, info in parameters.items() if k not in self.aliases}
        if not self.tensors:
            raise CheckpointError(
                f"{source}: expected floating-point parameters, found none; save the model again."
            )

    def read_array(
        self, name: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return elements [start, stop); see `Checkpoint.read_array`."""
        return (self._stacks.get(name) or self._locations[name]).read_array(name, start, stop, out)


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
    from subnet_ft.checkpoints.adapter import open_adapter

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
