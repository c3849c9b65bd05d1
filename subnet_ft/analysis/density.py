"""Where a mask is dense: overall, by layer, by matrix type. Always weighted by numel.

The paper's script averages tensors instead, so that a norm weighs as much as a projection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from subnet_ft.mask import SubnetMask

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass
class Density:
    """Counts of a group of parameters.

    Attributes:
        label: what the group is.
        nnz: number of indices.
        numel: number of weights.
        changed: {rule: how many weights it called changed}, where the mask knows it of every
            parameter in the group.
    """

    label: str
    nnz: int = 0
    numel: int = 0
    changed: dict[str, int] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Compute nnz / numel."""
        return self.nnz / self.numel if self.numel else 0.0

    def as_dict(self) -> dict[str, object]:
        """Return the counts with their densities."""
        return {
            "label": self.label,
            "nnz": self.nnz,
            "numel": self.numel,
            "density": self.density,
            "changed_density": {rule: n / self.numel for rule, n in self.changed.items()},
        }


def layer_of(name: str) -> str:
    """Return the number of the layer a parameter is in, or "other".

    Example:
        >>> layer_of("model.layers.11.mlp.up_proj.weight"), layer_of("model.norm.weight")
        ('11', 'other')
    """
    match = _LAYER.search(name)
    return match[1] if match else "other"


def matrix_type_of(name: str) -> str:
    """Return the name of the matrix without its place in the model.

    Example:
        >>> matrix_type_of("model.layers.0.mlp.up_proj.weight"), matrix_type_of("h.0.ln_1.bias")
        ('up_proj', 'ln_1.bias')
    """
    parts = name.split(".")
    if parts[-1] == "weight":
        return parts[-2] if len(parts) > 1 else name
    return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


def density_by(mask: SubnetMask, label: Callable[[str], str]) -> list[Density]:
    """Sum a mask over groups of parameters.

    Args:
        mask: read by its counts only.
        label: parameter name -> group, such as `layer_of` or `matrix_type_of`.

    Returns:
        One entry a group: numbered ones (layers) in order, the others as they come, last.
    """
    groups: dict[str, list[str]] = {}
    for name in mask.shapes:
        groups.setdefault(label(name), []).append(name)
    # Checkpoints list layer 10 before layer 2.
    ordered = sorted(groups, key=lambda key: int(key) if key.isdigit() else math.inf)
    return [_sum(mask, key, groups[key]) for key in ordered]


def overall_density(mask: SubnetMask) -> Density:
    """Sum a mask over all its parameters."""
    return _sum(mask, "all", mask.shapes)


def extremes(mask: SubnetMask, count: int = 3) -> tuple[list[Density], list[Density]]:
    """Return the densest and the sparsest parameters, most extreme first.

    Args:
        mask: read by its counts only.
        count: how many of each.
    """
    ranked = sorted(density_by(mask, lambda name: name), key=lambda entry: entry.density)
    return ranked[: -count - 1 : -1], ranked[:count]


def _sum(mask: SubnetMask, label: str, names: Iterable[str]) -> Density:
    names = list(names)
    known = [mask.changed.get(name, {}) for name in names]
    rules = [rule for rule in known[0] if all(rule in counts for counts in known)] if known else []
    return Density(
        label,
        sum(mask.counts[name] for name in names),
        sum(math.prod(mask.shapes[name]) for name in names),
        {rule: sum(counts[rule] for counts in known) for rule in rules},
    )
