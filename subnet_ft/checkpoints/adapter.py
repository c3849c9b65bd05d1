"""A PEFT adapter directory as a checkpoint: what merging it into its base would give.

peft itself is not imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from subnet_ft.checkpoints.base import Checkpoint
from subnet_ft.checkpoints.lora import lora_patches
from subnet_ft.checkpoints.overlay import OverlayCheckpoint
from subnet_ft.checkpoints.stored import open_checkpoint, read_json
from subnet_ft.checkpoints.subnet import subnet_patches
from subnet_ft.errors import CheckpointError, UnsupportedError
from subnet_ft.storage.tensor_files import SafetensorsFile


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
    if kind == "LORA":
        patches = lora_patches(source, file, config, opened)
    else:
        patches = subnet_patches(file, opened)
    return OverlayCheckpoint(source, path, opened, patches)
