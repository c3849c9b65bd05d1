"""What fits on a GPU, and the densest mask that does."""

from dataclasses import dataclass
from math import ceil

from transformers import PretrainedConfig

from subnet_ft.errors import ConfigError
from subnet_ft.plan.footprint import Footprint, trace_short
from subnet_ft.plan.methods import Method
from subnet_ft.plan.steps import Setting
from subnet_ft.plan.tracker import Place

GIB = 1 << 30
# Of a card of so many GiB: 1 for CUDA's context and the libraries' workspaces, 4% for what the
# allocator cannot use (fragments, rounding) and cards that have less than their name says.
CONTEXT, FRAGMENTS = GIB, 0.04
SAMPLES = (0.01, 0.05)  # densities traced to draw the lines
GRAIN = 10_000  # densities are searched in steps of 0.01%


def budget(gib: float) -> int:
    """Return the bytes of a GPU that a step may hold.

    Args:
        gib: The GPU's memory.

    Raises:
        ConfigError: Nothing is left of it.
    """
    left = int(gib * GIB * (1 - FRAGMENTS)) - CONTEXT
    if left <= 0:
        raise ConfigError(f"gpu: expected more than 1 GiB, found {gib:g}; name the card's memory")
    return left


@dataclass(frozen=True)
class Lines:
    """Each place's peak as a line in the density, through two traces; rounding aside, it is one.

    Args:
        low: Traced at the first of `SAMPLES`.
        high: At the second.
    """

    low: Footprint
    high: Footprint

    def densest(self, limit: int) -> float:
        """Return the largest density at which no place has more than a limit, 0 if there is none.

        Args:
            limit: Bytes.
        """
        return min(self._crossing(place, limit) for place in self.low.peaks)

    def slope(self, place: Place) -> float:
        """Return how fast a place's peak grows with the density."""
        rise = self.high.peaks[place][0] - self.low.peaks[place][0]
        return rise / (SAMPLES[1] - SAMPLES[0])

    def _crossing(self, place: Place, limit: int) -> float:
        first, slope = self.low.peaks[place][0], self.slope(place)
        if slope <= 0:
            return float(first <= limit)
        return min(1.0, max(0.0, SAMPLES[0] + (limit - first) / slope))


def draw_lines(config: PretrainedConfig, method: Method, setting: Setting) -> Lines:
    """Trace a masked method at two densities, neither of them its own."""
    return Lines(*(trace_short(config, method.at(density), setting) for density in SAMPLES))


def largest_density(
    config: PretrainedConfig, method: Method, setting: Setting, lines: Lines, limit: int
) -> tuple[float, Footprint] | None:
    """Find the densest mask whose step holds no more than a limit, confirmed by a trace.

    Args:
        config: The model's.
        method: A masked one; its density is not looked at.
        setting: On what.
        lines: What `draw_lines` gave for these.
        limit: Bytes.

    Returns:
        The density, in steps of 0.01%, and the step traced at it; None: none fits.
    """
    step = int(lines.densest(limit) * GRAIN)
    fits, failed, best = 0, step + 1, None
    while fits < step < failed:
        found = trace_short(config, method.at(step / GRAIN), setting)
        over = found.peak - limit
        if over <= 0:
            fits, best = step, (step / GRAIN, found)
        else:
            failed = step
        # Down along the line until one fits; that may go too far, so then halve what is between.
        slope = max(1.0, lines.slope(found.where) / GRAIN)  # bytes of a step
        step = (fits + failed) // 2 if fits else step - max(1, ceil(over / slope))
    return best
