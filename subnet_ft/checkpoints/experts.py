"""Mixtures of experts: checkpoints store one tensor per expert, the model holds one for all.

transformers 5 stacks the experts of a layer as it loads them (its ``conversion_mapping.py``, the
families of ``qwen2_moe`` and ``mixtral``), and takes them apart again as it saves::

    experts.{e}.gate_proj.weight (w1), experts.{e}.up_proj.weight (w3)  (width, hidden) each
        -> experts.gate_up_proj (experts, 2 * width, hidden)
    experts.{e}.down_proj.weight (w2)                                   (hidden, width)
        -> experts.down_proj (experts, hidden, width)

Row-major, each is the concatenation of its parts, so that nothing needs to be stacked to read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from subnet_ft.errors import CheckpointError, UnsupportedError
from subnet_ft.storage.arrays import array_dtype
from subnet_ft.storage.tensor_files import TensorFile, TensorInfo

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
_MATRICES = {
    "gate_proj.weight": ("gate_up_proj", 0),
    "w1.weight": ("gate_up_proj", 0),
    "up_proj.weight": ("gate_up_proj", 1),
    "w3.weight": ("gate_up_proj", 1),
    "down_proj.weight": ("down_proj", 0),
    "w2.weight": ("down_proj", 0),
}
_MIXTRAL = ".block_sparse_moe."  # `.mlp.` in the model


class Place(NamedTuple):
    """Where a stored tensor lies in a parameter: its name, and the element it begins at."""

    name: str
    start: int


class Stack:
    """One parameter, read from the stored tensors it is the concatenation of.

    Args:
        parts: (file, key) of each, in order.
    """

    def __init__(self, parts: list[tuple[TensorFile, str]]) -> None:
        self._parts = parts
        sizes = [file.tensors[key].numel for file, key in parts]
        self.starts = [0, *accumulate(sizes)]
        self._dtype = parts[0][0].tensors[parts[0][1]].dtype

    def read_array(
        self, name: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return elements [start, stop); see `Checkpoint.read_array`."""
        if out is None:
            out = np.empty(stop - start, array_dtype(self._dtype))
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for i in range(first, len(self._parts)):
            begin, end = max(start, self.starts[i]), min(stop, self.starts[i + 1])
            if begin >= end:
                break
            file, key = self._parts[i]
            piece = file.read_array(key, begin - self.starts[i], end - self.starts[i])
            out[begin - start : end - start] = piece
        return out[: stop - start]


def stack_experts(
    source: str,
    stored: Mapping[str, TensorInfo],
    locations: Mapping[str, TensorFile],
    name_of: Callable[[str], str],
) -> tuple[dict[str, TensorInfo], dict[str, Stack], dict[str, Place]]:
    """Find the parameters that stored tensors make up.

    Args:
        source: What the user called the checkpoint.
        stored: Name of a stored tensor -> shape and dtype.
        locations: Name of a stored tensor -> its file.
        name_of: Name of a stored tensor -> the name it has in the model.

    Returns:
        parameters: name -> shape and dtype, as the model has them, in the stored order.
        stacks: those of them that are stored in parts, or under another name.
        places: name of each such stored tensor -> its place.

    Raises:
        CheckpointError: An expert is missing, or two differ in shape or dtype.
        UnsupportedError: Experts hold other matrices than those above.
    """
    parts: dict[str, dict[tuple[int, int], str]] = {}
    parameters: dict[str, TensorInfo] = {}
    mixtral = any(_MIXTRAL in key and _EXPERT.fullmatch(key) for key in stored)
    for key, info in stored.items():
        name = name_of(key.replace(_MIXTRAL, ".mlp.") if mixtral else key)
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            module, number, matrix = expert.groups()
            if matrix not in _MATRICES or len(info.shape) != 2:
                raise UnsupportedError(
                    f"{source}: {key}: expected experts of gate_proj, up_proj and down_proj (or "
                    f"w1, w3, w2), found {matrix} {info.shape}; this mixture's layout is not known"
                )
            leaf, half = _MATRICES[matrix]
            name = f"{module}.{leaf}"
            parts.setdefault(name, {})[int(number), half] = key
        elif name != key:
            parts[name] = {(0, 0): key}
        parameters[name] = info
    stacks: dict[str, Stack] = {}
    places: dict[str, Place] = {}
    for name, keys in parts.items():
        infos = {stored[key] for key in keys.values()}
        halves = 1 + max(half for _, half in keys)
        experts = len(keys) // halves
        whole = {(expert, half) for expert in range(experts) for half in range(halves)}
        if set(keys) != whole or len(infos) > 1:
            raise CheckpointError(
                f"{source}: {name}: expected experts 0 to {max(e for e, _ in keys)}, all of one "
                f"shape and dtype, found {len(keys)} tensors of {len(infos)} kinds; save it again."
            )
        ordered = [keys[place] for place in sorted(keys)]
        stacks[name] = Stack([(locations[key], key) for key in ordered])
        starts = zip(ordered, stacks[name].starts, strict=False)
        places |= {key: Place(name, start) for key, start in starts}
        info = infos.pop()
        if _EXPERT.fullmatch(ordered[0]):
            rows, cols = info.shape
            parameters[name] = TensorInfo((experts, halves * rows, cols), info.dtype)
    return parameters, stacks, places
