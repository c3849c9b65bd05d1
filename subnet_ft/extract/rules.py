"""When a weight counts as changed: bit for bit in bf16, or beyond the paper's tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from subnet_ft.errors import CheckpointError, ConfigError
from subnet_ft.storage.arrays import bf16_bits, has_nan, integers, widen

PAPER_RULE = "abs:1e-5"
_PAPER_TOLERANCE = 1e-5


class Changes(NamedTuple):
    """What changed in one chunk.

    Attributes:
        bits: (elements,) bool, changed under the rule.
        where: (nnz,) int64, positions of the set bits.
        values: (nnz,) uint16, the base's values there, rounded to bfloat16.
        bitwise: how many changed bit for bit.
        paper: how many changed under the paper's rule, `abs:1e-5`.
    """

    bits: np.ndarray
    where: np.ndarray
    values: np.ndarray
    bitwise: int
    paper: int


@dataclass(frozen=True)
class Rule:
    """A parsed rule.

    Attributes:
        text: "bitwise" or "abs:X".
        tolerance: X; None for bitwise.
    """

    text: str
    tolerance: float | None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse "bitwise" or "abs:X".

        Raises:
            ConfigError: anything else.
        """
        if text == "bitwise":
            return cls(text, None)
        kind, _, number = text.partition(":")
        try:
            tolerance = float(number)
        except ValueError:
            tolerance = math.nan
        if kind != "abs" or not 0 <= tolerance < math.inf:
            raise ConfigError(
                f"rule must be 'bitwise' or 'abs:X' with X >= 0, got {text!r}; "
                f"use bitwise or {PAPER_RULE}."
            )
        return cls(text, tolerance)

    def changes(self, base: np.ndarray, tuned: np.ndarray) -> Changes:
        """Compare two flat slices, each as `storage.arrays` holds them.

        Bitwise means `a != b` after casting both to `comparison_dtype` (so -0 equals +0). `abs:X`
        means that their difference, in that dtype, is not within X as rounded to that dtype.

        Args:
            base: (elements,) floating point, or uint16 that holds bfloat16.
            tuned: the same.

        Raises:
            CheckpointError: a value is NaN, or a changed value is infinite, on either side.

        Source: arXiv 2505.11711, section 2.2, and its script check_sparsity.py (torch.isclose of
            the bf16 difference to zero).
        """
        dtype = comparison_dtype(base.dtype, tuned.dtype)
        for values, side in ((base, "base"), (tuned, "tuned")):
            # Rounding would turn a NaN into something else; a bf16 NaN is met as a change below.
            if values.dtype.kind == "f" and np.isnan(values).any():
                _check_finite(values, side)
        left, right = _cast(base, dtype), _cast(tuned, dtype)
        # As integers, far faster than as floats. They disagree with floats twice: a NaN equals
        # itself (refused here), and -0 differs from +0 (dropped below).
        if has_nan(left):
            _check_finite(widen(left), "base")
        bits = np.not_equal(integers(left), integers(right))
        where = np.flatnonzero(bits)
        before, after = widen(left.take(where)), widen(right.take(where))
        with np.errstate(invalid="ignore", over="ignore"):
            delta = widen(_cast(after - before, dtype))
        if not np.isfinite(delta).all():
            _check_finite(before, "base")
            _check_finite(after, "tuned")
        moved = before != after
        bitwise = int(np.count_nonzero(moved))
        paper = int(np.count_nonzero(_beyond(delta, _PAPER_TOLERANCE, dtype)))
        if self.tolerance is not None:
            moved = _beyond(delta, self.tolerance, dtype)
        if not moved.all():
            bits[where[~moved]] = False
            where = where[moved]
        return Changes(bits, where, bf16_bits(base.take(where)), bitwise, paper)


def comparison_dtype(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype two checkpoints are compared in: bf16 (uint16) unless one is fp16.

    fp16 against fp16 or wider compares in fp16, against bf16 in fp32, which holds both.
    """
    half, brain = np.dtype(np.float16), np.dtype(np.uint16)
    if half not in (a, b):
        return brain
    return np.dtype(np.float32) if brain in (a, b) else half


def _cast(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype == np.uint16:
        return bf16_bits(values)
    with np.errstate(over="ignore"):  # beyond fp16's range is infinite there
        return widen(values) if dtype == np.float32 else values.astype(dtype, copy=False)


def _beyond(delta: np.ndarray, tolerance: float, dtype: np.dtype[Any]) -> np.ndarray:
    # torch.isclose rounds the tolerance to the tensor's dtype.
    bound = widen(_cast(np.array([tolerance], np.float32), dtype))
    return ~(np.abs(delta) <= bound)


def _check_finite(values: np.ndarray, side: str) -> None:
    wrong = values[~np.isfinite(values)]
    if len(wrong):
        raise CheckpointError(
            f"expected finite weights, found {float(wrong[0])} in the {side} checkpoint; "
            "its run diverged or the file is damaged, use another checkpoint."
        )
