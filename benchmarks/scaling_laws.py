"""What `benchmarks.scaling` expects, fitted slopes beside it, and its tables: from its rows."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import fit, fits_table

FULL_STATE = 8.0  # bytes a parameter: weight, gradient and two moments in bf16
Row = dict[str, Any]
SIDES = ("masked", "full")


def masked_state(density: float) -> float:
    """Return bytes of state a parameter: bf16 weight; index, value, original, gradient, moments."""
    return 2 + (8 + 4 + 2 + 4 + 8) * density


def packed_index(density: float) -> float:
    """Return bytes of stored indices a parameter: int32 or a bitmap, whichever is smaller."""
    return min(4 * density, 0.125)


def adapter_file(density: float) -> float:
    """Return bytes of an adapter file a parameter: indices and fp32 values."""
    return packed_index(density) + 4 * density


def first_sync(density: float) -> float:
    """Return bytes a parameter of a sync that carries indices and bf16 values."""
    return packed_index(density) + 2 * density


def laws(results: Row) -> list[Row]:
    """Fit what grows, each beside what to expect."""
    density = results["density_elsewhere"]
    return [
        *({"sweep": "size", **law} for law in by_size(results["size"], density)),
        *({"sweep": "density", **law} for law in by_density(results["density"])),
        *({"sweep": "length", **law} for law in by_length(results["length"])),
    ]


def by_size(rows: Sequence[Row], density: float) -> list[Row]:
    """Fit against the number of parameters."""
    fits = []
    for side in SIDES:
        there = [row for row in rows if row[side]]
        if len(there) < 2:
            continue
        for what, number, expected, why in (
            ("step", _step, _exponent(there, "parameters"), "the operations' own exponent"),
            ("forward and backward", _passes, _exponent(there, "parameters"), "as above"),
            ("optimizer", _optimizer, 1.0, "every trained entry is stepped"),
        ):
            points = [(row["parameters"], number(row[side])) for row in there]
            fits.append(
                fit(f"{what}, {side}, ms", "parameters", points, logarithmic=True,
                    expected=expected, why=why)
            )  # fmt: skip
    formulas: tuple[tuple[str, str, str, float, str], ...] = (
        ("state", "masked", "state_bytes", masked_state(density), "2 + 26 d"),
        ("state", "full", "state_bytes", FULL_STATE, "2 + 2 + 4"),
        ("adapter file", "masked", "file_bytes", adapter_file(density), "min(4 d, 0.125) + 4 d"),
        ("first sync", "masked", "sync_bytes", first_sync(density), "min(4 d, 0.125) + 2 d"),
        ("later sync", "masked", "sync_values_bytes", 2 * density, "2 d"),
    )
    for what, side, key, expected, why in formulas:
        points = [(row["parameters"], row[side][key]) for row in rows if row[side]]
        if len(points) > 1:
            fits.append(
                fit(f"{what}, {side}, bytes", "parameters", points, expected=expected,
                    expected_intercept=0.0, why=f"{why} = {expected:.4g} a parameter")
            )  # fmt: skip
    points = [(2 * r["extraction"]["bytes_a_side"], r["extraction"]["seconds"]) for r in rows]
    fits.append(
        fit("extraction, seconds", "bytes, both sides", points, logarithmic=True, expected=1.0,
            why="linear in what is read")
    )  # fmt: skip
    return fits


def by_density(rows: Sequence[Row]) -> list[Row]:
    """Fit against the density; file and sync, which bend at 1/32, against their formulas."""
    count = rows[0]["parameters"]
    return [
        fit("state, bytes a parameter", "density",
            [(row["density"], row["masked"]["state_bytes"] / count) for row in rows],
            expected=26.0, expected_intercept=2.0, why="2 + 26 d"),
        fit("adapter file, bytes a parameter", "min(4 d, 0.125) + 4 d",
            [(adapter_file(r["density"]), r["masked"]["file_bytes"] / count) for r in rows],
            expected=1.0, expected_intercept=0.0, why="the formula itself"),
        fit("first sync, bytes a parameter", "min(4 d, 0.125) + 2 d",
            [(first_sync(r["density"]), r["masked"]["sync_bytes"] / count) for r in rows],
            expected=1.0, expected_intercept=0.0, why="the formula itself"),
        fit("later sync, bytes a parameter", "density",
            [(row["density"], row["masked"]["sync_values_bytes"] / count) for row in rows],
            expected=2.0, expected_intercept=0.0, why="2 d: bf16 values"),
        fit("optimizer, masked, ms", "density",
            [(row["density"], _optimizer(row["masked"])) for row in rows],
            why="a straight line: a call for each tensor, then a part for each entry"),
        fit("forward and backward, masked, ms", "density",
            [(row["density"], _passes(row["masked"])) for row in rows],
            why="a straight line: the model's own, then a gathered gradient for each entry"),
        fit("extraction, seconds", "share changed",
            [(row["density"], row["extraction"]["seconds"]) for row in rows],
            why="a straight line: reading, then a part for each change"),
    ]  # fmt: skip


def by_length(rows: Sequence[Row]) -> list[Row]:
    """Fit against the length of one row."""
    fits = []
    exponent = _exponent(rows, "length")
    for side in SIDES:
        for what, number, expected, why in (
            ("step", _step, None, "between the optimizer's 0 and the operations'"),
            ("forward and backward", _passes, exponent, "the operations' own exponent"),
            ("optimizer", _optimizer, 0.0, "no function of tokens"),
        ):
            points = [(row["length"], number(row[side])) for row in rows]
            fits.append(
                fit(f"{what}, {side}, ms", "length", points, logarithmic=True, expected=expected,
                    why=why)
            )  # fmt: skip
        points = [(row["length"], row[side]["transient_bytes"]) for row in rows]
        fits.append(
            fit(f"transient, {side}, bytes", "length", points,
                why="a straight line once activations outweigh the gradients a step holds")
        )  # fmt: skip
        points = [(row["length"], row[side]["state_bytes"]) for row in rows]
        fits.append(
            fit(f"state, {side}, bytes", "length", points, expected=0.0, why="no function of it")
        )
    return fits


def _exponent(rows: Sequence[Row], key: str) -> float:
    """Return how the operations grow over the same points."""
    points = [(row[key], row["operations"]) for row in rows]
    return float(fit("operations", key, points, logarithmic=True)["slope"])


def _step(side: Row) -> float:
    return float(side["step_ms"])


def _passes(side: Row) -> float:
    return float(side["phases_ms"]["forward"] + side["phases_ms"]["backward"])


def _optimizer(side: Row) -> float:
    return float(side["phases_ms"]["optimizer"])


def show(results: Row) -> None:
    """Print a table a sweep, and the fits."""
    console = Console(width=150)
    for sweep, label in (
        ("size", lambda row: row["model"]),
        ("density", lambda row: f"{row['density']:.1%}"),
        ("length", lambda row: str(row["length"])),
    ):
        console.print(_table(sweep, results[sweep], label))
    console.print(fits_table(results["fits"]))


def _table(sweep: str, rows: Sequence[Row], label: Callable[[Row], str]) -> Table:
    columns = ("full, ms", "masked, ms", "ratio", "range", "optimizer, ms", "state, MB", "full's",
               "peak, MB", "full's", "file, MB", "sync, MB", "later", "extraction, s")  # fmt: skip
    table = Table(sweep, *columns)
    for row in rows:
        full, masked = row["full"], row["masked"]

        def mb(side: Row | None, key: str) -> str:
            return f"{side[key] / 1e6:.4g}" if side and key in side else ""

        table.add_row(
            label(row),
            f"{full['step_ms']:.0f}" if full else "",
            f"{masked['step_ms']:.0f}",
            f"{masked['ratio']:.2f}" if full else "",
            "{:.2f}-{:.2f}".format(*masked["ratio_range"]) if full else "",
            f"{masked['phases_ms']['optimizer']:.1f}",
            mb(masked, "state_bytes"),
            mb(full, "state_bytes"),
            mb(masked, "peak_bytes"),
            mb(full, "peak_bytes"),
            mb(masked, "file_bytes"),
            mb(masked, "sync_bytes"),
            mb(masked, "sync_values_bytes"),
            f"{row['extraction']['seconds']:.2f}" if "extraction" in row else "",
        )
    return table
