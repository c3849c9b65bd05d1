"""The largest changes of each parameter, up to a share of it: a mask of any run, at any density.

A run that changes every weight (LoRA, an fp32 run) has a mask of its largest |tuned - base|, in
fp32. Magnitudes order as their bits do as integers, so that counting the upper 16 bits, and then
the lower 16 among those that tie in the upper, finds the smallest that is kept: two passes over the
checkpoints before the one that writes, and no more memory than it takes. Of equal ones at that
bound the lowest indices are kept. What did not change is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

import numpy as np

from subnet_ft.errors import ConfigError
from subnet_ft.extract.pair import Pair
from subnet_ft.extract.rules import Changes, Rule
from subnet_ft.storage.arrays import bf16_bits, widen

_BINS = 1 << 16
_NAN = 0x7F800000  # bits beyond infinity's
_BITWISE = Rule.parse("bitwise")
Candidates = tuple[Changes, np.ndarray]


class Largest:
    """Chooses the largest changes of each parameter.

    Args:
        keep: share of each parameter, in (0, 1]; at least one entry, if one changed.

    Raises:
        ConfigError: ``keep`` is no such share.
    """

    def __init__(self, keep: float) -> None:
        """Check the share."""
        if not 0 < keep <= 1:
            raise ConfigError(f"keep must be in (0, 1], got {keep}; pass a share like 0.05.")
        self.keep, self.text = keep, f"largest:{keep:g}"

    def changes(
        self, pair: Pair, names: Sequence[str], advance: Callable[[int], object]
    ) -> Generator[Changes, None, None]:
        """Yield what is chosen, chunk by chunk; three passes over the checkpoints.

        Args:
            pair: the checkpoints.
            names: of the parameters.
            advance: takes the number of elements just done.

        Raises:
            CheckpointError: a checkpoint cannot be read, or holds what is not finite.
        """
        bounds = self._bounds(pair, names, advance)

        def candidates(name: str, base: np.ndarray, tuned: np.ndarray) -> Candidates:
            return _candidates(base, tuned, bounds[name][0])

        with closing(pair.compare(names, candidates)) as chunks:
            for name in names:
                _, left = bounds[name]
                for _ in pair.chunks(name):
                    elements, (changes, equal) = next(chunks)
                    yield _without(changes, equal[left:])
                    left = max(0, left - len(equal))
                    advance(elements)

    def _bounds(
        self, pair: Pair, names: Sequence[str], advance: Callable[[int], object]
    ) -> dict[str, tuple[int, int]]:
        """Find the bits of the smallest magnitude kept, and how many of that very one."""
        wanted = {name: max(1, round(self.keep * pair.numel(name))) for name in names}

        def upper(name: str, base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
            bits = magnitudes(base, tuned)
            return np.bincount(bits[bits != 0] >> 16, minlength=_BINS)

        tops = {name: _bound(c, wanted[name]) for name, c in _counts(pair, names, upper, advance)}

        def lower(name: str, base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
            bits = magnitudes(base, tuned)
            bits = bits[(bits != 0) & (bits >> 16 == tops[name][0])]
            return np.bincount(bits & (_BINS - 1), minlength=_BINS)

        bounds = {}
        for name, counts in _counts(pair, names, lower, advance):
            top, left = tops[name]
            low, equal = _bound(counts, left)
            bounds[name] = (top << 16 | low, equal)
        return bounds


def magnitudes(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """Return the bits of |tuned - base| in fp32, which order as the magnitudes do.

    Args:
        base: (elements,) as `storage.arrays` holds them.
        tuned: the same.

    Returns:
        (elements,) uint32; 0 where nothing changed, equal infinities included.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        delta = np.abs(widen(tuned) - widen(base))
    bits = delta.view(np.uint32)
    bits[bits > _NAN] = 0
    return bits


def _counts(
    pair: Pair,
    names: Sequence[str],
    count: Callable[[str, np.ndarray, np.ndarray], np.ndarray],
    advance: Callable[[int], object],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each parameter's name and the sum of its chunks' counts."""
    with closing(pair.compare(names, count)) as chunks:
        for name in names:
            total = np.zeros(_BINS, np.int64)
            for _ in pair.chunks(name):
                elements, counts = next(chunks)
                total += counts
                advance(elements)
            yield name, total


def _bound(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """Return the bin of the ``wanted``-th largest (of the smallest, if fewer), and its rank there.

    Args:
        counts: (bins,) how many lie in each.
        wanted: how many of the largest are wanted.
    """
    at_least = counts[::-1].cumsum()[::-1]
    wanted = min(wanted, int(at_least[0]))
    if not wanted:
        return _BINS - 1, 0
    top = int(np.flatnonzero(at_least >= wanted)[-1])
    return top, wanted - int(at_least[top] - counts[top])


def _candidates(base: np.ndarray, tuned: np.ndarray, bound: int) -> Candidates:
    """Return every change up to the bound, and which of them, as positions, are at it."""
    rules = _BITWISE.changes(base, tuned)
    magnitude = magnitudes(base, tuned)
    bits = (magnitude >= bound) & (magnitude != 0)
    where = np.flatnonzero(bits)
    equal = np.flatnonzero(magnitude.take(where) == bound)
    values = bf16_bits(base.take(where))
    return Changes(bits, where, values, rules.bitwise, rules.paper), equal


def _without(changes: Changes, surplus: np.ndarray) -> Changes:
    """Drop some of the changes, given as positions."""
    changes.bits[changes.where[surplus]] = False
    where, values = (np.delete(a, surplus) for a in (changes.where, changes.values))
    return changes._replace(where=where, values=values)
