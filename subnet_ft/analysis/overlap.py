"""How much masks have in common, beside what chance would give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from subnet_ft.errors import ConfigError
from subnet_ft.mask import SubnetMask
from subnet_ft.storage.indices import contains


@dataclass(frozen=True)
class Overlap:
    """Counts of two masks A and B, and what follows from them.

    Every ratio is 0.0 where its denominator is 0.

    Attributes:
        nnz_a: |A|.
        nnz_b: |B|.
        numel: number of weights both target.
        intersection: |A & B|.
        expected: the intersection of random masks with the same number of indices per parameter.

    Source: arXiv 2505.11711, section 5 and appendix E (o1, o2, uniform chance); differs in the
        chance level matched per parameter, lift and ceiling, which the paper does not report.
    """

    nnz_a: int
    nnz_b: int
    numel: int
    intersection: int
    expected: float

    @property
    def o1(self) -> float:
        """Share of A that is in B."""
        return _ratio(self.intersection, self.nnz_a)

    @property
    def o2(self) -> float:
        """Share of B that is in A."""
        return _ratio(self.intersection, self.nnz_b)

    @property
    def chance_o1(self) -> float:
        """o1 of random masks with the same number of indices per parameter."""
        return _ratio(self.expected, self.nnz_a)

    @property
    def chance_o2(self) -> float:
        """o2 of random masks with the same number of indices per parameter."""
        return _ratio(self.expected, self.nnz_b)

    @property
    def uniform_o1(self) -> float:
        """o1 of masks spread uniformly over all parameters: the density of B (the paper's)."""
        return _ratio(self.nnz_b, self.numel)

    @property
    def uniform_o2(self) -> float:
        """o2 of masks spread uniformly over all parameters: the density of A (the paper's)."""
        return _ratio(self.nnz_a, self.numel)

    @property
    def lift(self) -> float:
        """Intersection over its matched chance level; the same for o1 and o2."""
        return _ratio(self.intersection, self.expected)

    @property
    def uniform_lift(self) -> float:
        """Intersection over its uniform chance level."""
        return _ratio(self.o1, self.uniform_o1)

    @property
    def ceiling_o1(self) -> float:
        """Largest o1 these sizes allow."""
        return _ratio(min(self.nnz_a, self.nnz_b), self.nnz_a)

    @property
    def ceiling_o2(self) -> float:
        """Largest o2 these sizes allow."""
        return _ratio(min(self.nnz_a, self.nnz_b), self.nnz_b)

    @property
    def jaccard(self) -> float:
        """Intersection over union."""
        return _ratio(self.intersection, self.nnz_a + self.nnz_b - self.intersection)

    @property
    def chance_jaccard(self) -> float:
        """Jaccard index at the matched chance level."""
        return _ratio(self.expected, self.nnz_a + self.nnz_b - self.expected)

    def as_dict(self) -> dict[str, float]:
        """Return counts and everything derived from them."""
        derived = [k for k, v in vars(type(self)).items() if isinstance(v, property)]
        return {**vars(self), **{name: getattr(self, name) for name in derived}}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def overlap(a: SubnetMask, b: SubnetMask) -> Overlap:
    """Compare two masks of one base model, parameter by parameter.

    Args:
        a: the first mask.
        b: the second; same parameters and shapes.

    Raises:
        MaskMismatchError: they target different parameters.

    Example:
        >>> import torch
        >>> a = SubnetMask({"w": torch.tensor([0, 1])}, {"w": (4,)})
        >>> b = SubnetMask({"w": torch.tensor([1, 2])}, {"w": (4,)})
        >>> overlap(a, b).o1, overlap(a, b).lift
        (0.5, 1.0)
    """
    a.check_same_shapes(b)
    intersection = 0
    expected = 0.0
    for name, shape in a.shapes.items():
        if name in a and name in b:
            intersection += int(contains(a[name], b[name]).sum())
            expected += a.counts[name] * b.counts[name] / math.prod(shape)
    return Overlap(a.nnz, b.nnz, a.numel, intersection, expected)


def pairwise_overlap(masks: Mapping[str, SubnetMask]) -> dict[tuple[str, str], Overlap]:
    """Compare every two of the named masks.

    Raises:
        ConfigError: fewer than two masks.
        MaskMismatchError: two of them target different parameters.
    """
    if len(masks) < 2:
        raise ConfigError(
            f"compare needs at least two different masks, got {len(masks)}; pass another."
        )
    return {(x, y): overlap(masks[x], masks[y]) for x, y in combinations(masks, 2)}
