"""A base checkpoint with changes laid over some of its parameters, read in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
from torch import Tensor

from subnet_ft.adapter_file import PREFIX
from subnet_ft.checkpoints.base import Checkpoint
from subnet_ft.errors import CheckpointError, MaskMismatchError
from subnet_ft.storage.arrays import to_tensor
from subnet_ft.storage.tensor_files import SafetensorsFile

Change = Callable[[Tensor, int], None]


class Patch(Protocol):
    """What an adapter does to one base parameter."""

    def load(self) -> Change:
        """Read what the change needs, and return a function that makes it.

        The function changes a flat slice of the base in place, given the slice and the index of its
        first element; threads may call it at once.
        """
        ...


class OverlayCheckpoint(Checkpoint):
    """A base with an adapter's changes; parameters without a patch are the base's.

    Args:
        source: what the user called the adapter.
        path: the adapter directory.
        base: what it lies over.
        patches: parameter name -> its change.

    Raises:
        MaskMismatchError: the base lacks a parameter the adapter changes.
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
        self._lock = Lock()
        self._loaded: tuple[str, Change] | None = None

    def read_array(
        self, name: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return elements [start, stop) after the change; see `Checkpoint.read_array`."""
        values = self.base.read_array(name, start, stop, out)
        if name in self.patches:  # the change is made in the array's memory
            self._change(name)(to_tensor(values, self.tensors[name].dtype), start)
        return values

    def _change(self, name: str) -> Change:
        # One parameter's change is kept: slices of a parameter are read one after another.
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None
                self._loaded = (name, self.patches[name].load())
            return self._loaded[1]


class Replacement:
    """A parameter the adapter stores whole (modules_to_save, or a copy of its base layer)."""

    def __init__(self, file: SafetensorsFile, key: str) -> None:
        """Remember where it is."""
        self._file, self._key = file, key

    def load(self) -> Change:
        """Return the change; see `Patch.load`."""
        return self.apply

    def apply(self, weight: Tensor, start: int) -> None:
        """Overwrite a flat slice of the base."""
        weight.copy_(self._file.read(self._key, start, start + weight.numel()))


def replacements(
    file: SafetensorsFile, keys: Iterable[str], base: Checkpoint
) -> dict[str, Replacement]:
    """Return the parameters an adapter file stores whole.

    Args:
        file: the adapter file.
        keys: those of its keys that nothing else explains.
        base: what the adapter lies over.

    Raises:
        CheckpointError: a key is no parameter of the base, or has another shape.
    """
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
        patches[name] = Replacement(file, key)
    return patches
