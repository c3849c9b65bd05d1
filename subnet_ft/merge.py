"""An adapter merged into its base: an ordinary Hugging Face model directory, streamed.

File for file as the base has it, in the base's dtypes, with the bits of the in-memory merge.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from subnet_ft.checkpoints import StoredCheckpoint, open_checkpoint
from subnet_ft.checkpoints.experts import Place
from subnet_ft.checkpoints.overlay import OverlayCheckpoint
from subnet_ft.errors import ConfigError
from subnet_ft.progress import progress_bar
from subnet_ft.storage.safetensors_writer import (
    SafetensorsWriter,
    check_target,
    header_bytes,
    tensor_bytes,
)
from subnet_ft.storage.tensor_files import TensorFile

_CHUNK = 1 << 22
# What a model directory holds besides weights; a run's own state is left behind.
_COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
    "*processor_config.json", "*.py", "LICENSE*",
)  # fmt: skip


class MergeSummary(NamedTuple):
    """What `merge_checkpoint` wrote.

    Attributes:
        output: the model directory.
        files: names of the weight files.
        parameters: number of parameters in them, tied ones once.
        changed_parameters: how many of those the adapter has a change for.
        bytes: size of the weight files' data.
    """

    output: Path
    files: tuple[str, ...]
    parameters: int
    changed_parameters: int
    bytes: int


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    progress: bool = True,
) -> MergeSummary:
    """Merge an adapter into its base, and write the model.

    Args:
        base: directory, weight file or hub id.
        adapter: adapter directory, ours or LoRA.
        output: the model directory to make; appears whole or not at all.
        progress: whether a terminal gets a progress bar.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the output exists, or `adapter` is no adapter.
        MaskMismatchError: the adapter belongs to another base.
        UnsupportedError: a kind of adapter that is not merged here.

    Example:
        >>> merge_checkpoint("base", "runs/adapter", "merged").bytes  # doctest: +SKIP
        269060352
    """
    target = Path(output)
    check_target(target)
    stored = open_checkpoint(base)
    if not isinstance(stored, StoredCheckpoint):
        raise ConfigError(f"{base}: expected a model as base, got an adapter; pass its base model.")
    overlay = open_checkpoint(adapter, base=stored)
    if not isinstance(overlay, OverlayCheckpoint):
        raise ConfigError(
            f"{adapter}: expected an adapter directory, got a model; pass the directory with "
            "adapter_config.json."
        )
    total = sum(info.numel for file in stored.files for info in file.tensors.values())
    size = 0
    weight_map: dict[str, str] = {}
    with (
        _new_directory(target) as folder,
        progress_bar("merge", total, progress) as advance,
    ):
        for file in stored.files:
            name = _output_name(file.path)
            # "pt" is how transformers knows the file as its own.
            metadata = {"format": "pt"}
            room = header_bytes(file.tensors, metadata)
            with SafetensorsWriter(folder / name, room) as writer:
                writer.metadata = metadata
                for key, info in file.tensors.items():
                    for piece in _pieces(stored, overlay, file, key):
                        writer.write(tensor_bytes(piece))
                        size += piece.numel() * piece.element_size()
                        advance(piece.numel())
                    writer.finish(key, info.dtype, info.shape)
                    weight_map[key] = name
        files = tuple(dict.fromkeys(weight_map.values()))
        if len(stored.files) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        _copy_companions(stored.path, folder)
    return MergeSummary(target, files, len(stored.tensors), len(overlay.patches), size)


def _pieces(
    stored: StoredCheckpoint, overlay: OverlayCheckpoint, file: TensorFile, key: str
) -> Iterator[Tensor]:
    """Yield one stored tensor in flat slices, merged where it is a parameter or tied to one."""
    name, offset = stored.places.get(key, Place(key, 0))
    name = stored.aliases.get(name, name)
    numel = file.tensors[key].numel
    for start in range(0, numel, _CHUNK):
        stop = min(start + _CHUNK, numel)
        if name in overlay.tensors:
            # A tied copy gets the embedding's values in its own dtype.
            dtype: torch.dtype = getattr(torch, file.tensors[key].dtype)
            yield overlay.read(name, offset + start, offset + stop).to(dtype)
        else:
            yield file.read(key, start, stop)


def _output_name(path: Path) -> str:
    """Keep a shard's name, with the suffix of what is written."""
    if path.suffix == ".bin":
        return path.stem.replace("pytorch_model", "model") + ".safetensors"
    return path.name


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Make a directory that gets its name when the block ends well, and goes away otherwise."""
    temporary = target.absolute().with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in _COMPANIONS if source.is_dir() else ():
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
