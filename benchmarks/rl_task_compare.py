"""Sets the runs of benchmarks/rl_task.py against each other: accuracies, intervals, a plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.optimizer import machine

matplotlib.use("Agg")
LAST = 10  # training steps whose mean reward chooses the learning rate
WINDOW = 5  # of the curves
Z, T = 1.960, {2: 12.706, 3: 4.303}  # 97.5% of the normal, and of Student's t by number of seeds
RULE = (
    f"learning rate: of three at seed 0, the one with the highest mean training reward over the "
    f"last {LAST} steps; heldout: share of held-out problems answered exactly, greedy decoding; "
    "wilson: 95% over problems, one run; interval: 95% over seeds, Student's t, the same problems"
)
Runs = Mapping[tuple[str, float, int], dict[str, Any]]


def best_rate(runs: Runs, method: str, seed: int) -> float:
    """Return the learning rate whose run ended with the highest training reward."""
    trials = {rate: run for (m, rate, s), run in runs.items() if m == method and s == seed}
    return max(trials, key=lambda rate: final_reward(trials[rate]))


def final_reward(run: dict[str, Any]) -> float:
    """Mean training reward of the last steps."""
    return statistics.mean(run["rewards"][-LAST:])


def summarize(
    runs: Runs, rates: Mapping[str, Sequence[float]], seeds: Sequence[int]
) -> dict[str, Any]:
    """Return everything the results file holds, except the mask's description."""
    tried = {method for method, _, seed in runs if seed == seeds[0]}
    of_rates = {m: best_rate(runs, m, seeds[0]) for m in rates if m in tried}
    methods = {}
    for method, rate in of_rates.items():
        trials = {r: run for (m, r, s), run in runs.items() if (m, s) == (method, seeds[0])}
        methods[method] = {
            **over_seeds(runs, method, rate, seeds),
            "rate_at_edge": rate in (rates[method][0], rates[method][-1]),
            "trials": [
                {
                    "learning_rate": r,
                    "final_reward": final_reward(run),
                    "heldout": run["heldout_after"],
                }
                for r, run in sorted(trials.items())
            ],
        }
    any_run = next(iter(runs.values()))
    size = any_run["heldout_problems"]
    before = any_run["heldout_before"]
    return {
        "machine": machine() | {"threads_a_run": 1, "runs_at_a_time": 2},
        "rule": RULE,
        "settings": any_run["settings"] | {"learning_rate": "by method", "seed": list(seeds)},
        "heldout_problems": size,
        "base": {"heldout": before, "wilson": wilson(before, size)},
        "methods": methods,
        "masked at the full run's rate": over_seeds(runs, "masked", of_rates["full"], seeds),
    }


def over_seeds(runs: Runs, method: str, rate: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Return what a method reached at one learning rate, every finished seed and together."""
    done = [seed for seed in seeds if (method, rate, seed) in runs]
    of = [runs[method, rate, seed] for seed in done]
    found = [run["heldout_after"] for run in of]
    return {
        "learning_rate": rate,
        "seeds": done,
        "heldout": found,
        "wilson": [wilson(run["heldout_after"], run["heldout_problems"]) for run in of],
        "mean": statistics.mean(found) if found else None,
        "interval": t_interval(found),
        "final_reward": [final_reward(run) for run in of],
        "trainable_parameters": of[0]["trainable_parameters"] if of else None,
        "seconds": [run["seconds"] for run in of],
        "seconds_a_step": [statistics.median(run["seconds_a_step"]) for run in of],
        "rewards": [run["rewards"] for run in of],
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of `count`."""
    centre = share + Z**2 / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    scale = 1 + Z**2 / count
    return (centre - spread) / scale, (centre + spread) / scale


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95% interval of the mean, or None of fewer than two."""
    if len(values) < 2:
        return None
    spread = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - spread, statistics.mean(values) + spread


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw training reward, smoothed, and held-out accuracy, a point a seed."""
    figure, (curves, heldout) = plt.subplots(
        1, 2, figsize=(12, 4), width_ratios=(3, 2), layout="constrained"
    )
    for i, (name, row) in enumerate(summary["methods"].items()):
        label = f"{name}, lr {row['learning_rate']:g}"
        for seed, rewards in enumerate(row["rewards"]):
            smooth = torch.tensor(rewards).unfold(0, WINDOW, 1).mean(1)
            steps = range(WINDOW, len(rewards) + 1)
            curves.plot(steps, smooth, f"C{i}", alpha=0.6, label=label if seed == 0 else None)
        heldout.plot(row["heldout"], [label] * len(row["heldout"]), "o", color=f"C{i}", alpha=0.6)
        heldout.plot(row["mean"], [label], "|", color=f"C{i}", markersize=24)
    base = summary["base"]
    heldout.axvline(base["heldout"], color="black", linewidth=0.8, label="before")
    heldout.axvspan(*base["wilson"], color="black", alpha=0.08, label="its 95% over problems")
    curves.set(xlabel="step", ylabel=f"training reward, mean of {WINDOW} steps, a line a seed")
    heldout.set(xlabel=f"held-out, exact, {summary['heldout_problems']} problems; bar: mean")
    heldout.margins(y=0.2)
    heldout.invert_yaxis()
    curves.legend(fontsize=8)
    heldout.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def show(summary: dict[str, Any]) -> None:
    """Print a row a method."""
    table = Table("trained", "lr", "held out, by seed", "mean", "95% over seeds", "entries, M")
    base = summary["base"]
    table.add_row("base", "", f"{base['heldout']:.0%}", "", "", "")
    beside = {"masked, full's lr": summary["masked at the full run's rate"]}
    for name, row in (summary["methods"] | beside).items():
        table.add_row(
            name,
            f"{row['learning_rate']:g}{' (edge)' if row.get('rate_at_edge') else ''}",
            " ".join(f"{x:.0%}" for x in row["heldout"]),
            f"{row['mean']:.1%}" if row["heldout"] else "",
            "{:.0%} to {:.0%}".format(*row["interval"]) if row["interval"] else "",
            f"{row['trainable_parameters'] / 1e6:.1f}" if row["heldout"] else "",
        )
    Console(width=120).print(table)
