"""Sets the runs of benchmarks/small_state.py against each other: figures, verdicts, a plot."""

import itertools
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
ORDERS = tuple(f"fp32, data order {i}" for i in (2, 3, 4))
ROWS = "fp32, rows swapped"
WINDOW = 10
RULE = (
    "within_noise: the mean over seeds of |held-out loss - fp32's| and the mean relative RMS "
    "difference of what was learned are both at most the 95th percentile of the same between two "
    "fp32 runs of different data order, over every choice of a pair for each seed; "
    "within_rounding_noise: both at most those of 'fp32, rows swapped'"
)


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Set every variant against fp32 of the same seed, and judge it by `RULE`."""
    rows: dict[str, dict[str, Any]] = {}
    exact = runs["fp32"]
    for variant, of in runs.items():
        curves = [windows(run["losses"]) for run in of]
        rows[variant] = {"loss_at": [statistics.mean(at) for at in zip(*curves, strict=True)]}
        finals = [curve[-1] for curve in curves]
        for key, found in (("final_loss", finals), ("heldout_loss", [r["heldout"] for r in of])):
            rows[variant][key] = found
            rows[variant] |= {
                f"{key}_mean": statistics.mean(found),
                f"{key}_std": statistics.stdev(found),
                f"{key}_minus_fp32": [a - b for a, b in zip(found, rows["fp32"][key], strict=True)],
            }
        rows[variant]["relative_rms"] = [
            (rms(run["learned"] - other["learned"]) / rms(other["learned"])).item()
            for run, other in zip(of, exact, strict=True)
        ]
    allowed = {"within_noise": noise(runs), "within_rounding_noise": distances(rows[ROWS])}
    for variant in set(rows) - {"fp32", *ORDERS, ROWS}:
        for key, limits in allowed.items():
            found = distances(rows[variant])
            rows[variant][key] = all(a <= b for a, b in zip(found, limits, strict=True))
    rows["fp32"]["noise"] = dict(zip(("heldout", "rms"), allowed["within_noise"], strict=True))
    return rows


def noise(runs: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """Return what `RULE` allows: 95th percentiles between fp32 runs of different data order."""

    def differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
        relative = rms(a["learned"] - b["learned"]) / rms(b["learned"])
        return abs(a["heldout"] - b["heldout"]), relative.item()

    seeds = zip(*(runs[name] for name in ("fp32", *ORDERS)), strict=True)
    pairs = [[differences(a, b) for a, b in itertools.combinations(of, 2)] for of in seeds]
    means = torch.tensor(list(itertools.product(*pairs))).mean(dim=1)
    heldout, relative = means.quantile(0.95, dim=0).tolist()
    return heldout, relative


def windows(losses: list[float]) -> list[float]:
    """Mean of the last `WINDOW` losses at six steps, 50, 100, ... of 300."""
    every = len(losses) // 6
    ends = range(every, 6 * every + 1, every)
    return [statistics.mean(losses[max(0, end - WINDOW) : end]) for end in ends]


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square."""
    return x.square().mean().sqrt()


def distances(row: dict[str, Any]) -> tuple[float, float]:
    """Both distances from fp32 that `RULE` compares."""
    losses = statistics.mean(map(abs, row["heldout_loss_minus_fp32"]))
    return losses, statistics.mean(row["relative_rms"])


def draw(rows: dict[str, dict[str, Any]], losses: dict[str, list[list[float]]], path: Path) -> None:
    """Draw loss curves, smoothed, and both distances from fp32, a point a seed."""
    figure, (curves, heldout, values) = plt.subplots(
        1, 3, figsize=(13, 4), width_ratios=(2, 1, 1), layout="constrained"
    )
    for i, (name, row) in enumerate(rows.items()):
        mean = torch.tensor(losses[name]).mean(0)
        smooth = mean.unfold(0, WINDOW, 1).mean(1)
        style = "-" if i < 4 else ":"
        curves.plot(range(WINDOW, len(mean) + 1), smooth, style, color=f"C{i}", label=name)
        if name != "fp32":
            names = [name] * len(row["relative_rms"])
            heldout.plot(row["heldout_loss_minus_fp32"], names, "o", color=f"C{i}")
            values.plot(row["relative_rms"], names, "o", color=f"C{i}")
    curves.set(
        xlabel="step",
        ylabel=f"loss, mean of {WINDOW} steps and {len(rows['fp32']['heldout_loss'])} seeds",
    )
    curves.legend(fontsize=8)
    heldout.axvline(0, color="black", linewidth=0.8)
    heldout.set(xlabel="held-out loss minus fp32's")
    values.set(xlabel="relative RMS difference from fp32", yticklabels=[])
    values.set_xlim(left=0)
    for axis in (heldout, values):
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print a row a variant."""
    table = Table("state", "final loss", "held out", "minus fp32", "relative RMS", "within noise")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['final_loss_mean']:.3f} ± {row['final_loss_std']:.3f}",
            f"{row['heldout_loss_mean']:.3f} ± {row['heldout_loss_std']:.3f}",
            " ".join(f"{x:+.3f}" for x in row["heldout_loss_minus_fp32"]),
            f"{statistics.mean(row['relative_rms']):.3f}",
            f"{row.get('within_noise', '')} {row.get('within_rounding_noise', '')}",
        )
    Console(width=120).print(table)
