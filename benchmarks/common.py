"""What several measurements share: a line through points, and the most bytes a step holds.

Importing it costs nothing: `benchmarks.extract` starts processes whose peak memory is measured, and
a process starts with its parent's as its own. What needs torch is imported where it is used.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Points = Sequence[tuple[float, float]]


def fit(
    what: str,
    x: str,
    points: Points,
    *,
    logarithmic: bool = False,
    expected: float | None = None,
    expected_intercept: float | None = None,
    why: str = "",
) -> dict[str, Any]:
    """Lay a line through points by least squares, in their logarithms where growth is a power.

    Args:
        what: Which quantity, with its unit.
        x: What it is measured against.
        points: At least two of (x, y); positive where ``logarithmic``.
        logarithmic: Fit the logarithms: the slope is then an exponent.
        expected: The slope to expect; None where nothing but a straight line is.
        expected_intercept: The same for the intercept.
        why: Where the expected ones come from.

    Returns:
        All of these beside ``slope``, ``intercept`` (of the logarithms, where they are fitted) and
        ``r2``, which is None where y does not vary.
    """
    xs, ys = zip(*points, strict=True)
    if logarithmic:
        xs, ys = ([math.log(value) for value in values] for values in (xs, ys))
    slope, intercept = statistics.linear_regression(xs, ys)
    varies = min(ys) != max(ys)
    return {
        "what": what,
        "x": x,
        "kind": "log-log" if logarithmic else "linear",
        "slope": slope,
        "intercept": intercept,
        "r2": statistics.correlation(xs, ys) ** 2 if varies else None,
        "expected": expected,
        "expected_intercept": expected_intercept,
        "why": why,
        "points": [list(point) for point in points],
    }


def fits_table(fits: Sequence[dict[str, Any]]) -> Any:
    """Return the fitted slopes beside the expected ones, to print with rich."""
    from rich.table import Table

    columns = ("what", "against", "kind", "slope", "expected", "intercept", "expected", "r2")
    table = Table(*columns, title="fitted and expected")
    for f in fits:
        numbers = (f[key] for key in ("slope", "expected", "intercept", "expected_intercept", "r2"))
        cells = ("" if number is None else f"{number:.4g}" for number in numbers)
        table.add_row(f["what"], f["x"], f["kind"], *cells)
    return table


def transient_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that ``run`` holds beyond those before it (on the CPU)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
