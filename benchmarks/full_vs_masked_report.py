"""Makes tables of the runs of `benchmarks/full_vs_masked.py`: ratios, pairs, what was learned."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.full_vs_masked_methods import FLASHOPTIM_BYTES, VARIANTS, Counts, Method

RULE = (
    "learning rates: as many trials a method, half a decade apart, at the first seed; its own is "
    "the one with the lowest mean training loss (highest reward) over the last third of the steps, "
    "held-out rows take no part; edge: it is the first or last of its row. A step's ratio is the "
    "median over steps of that step's ratio, of runs that take turns a step each, in company; its "
    "range is the middle half. Rounds: of what stands in pairs, with no accumulation and a "
    "reference as the trainer has it; all others take part in the first, if any take turns. A "
    "peak's ratio is the median over rounds. state_per_parameter: "
    "everything but the reference and buffers. flush: the write of all values by itself, "
    "part of optimizer. Released gradients are stepped in backward. peak: over imports"
)
HELD_OUT = {
    "dpo": "share of held-out pairs preferred",
    "sft": "held-out loss",
    "grpo": "held-out problems exact",
}
DTYPES = {"fidelity": "float32", "memory": "bfloat16"}
INDEX_BYTES = 8  # int64, on every device
MASKED = "masked random 5%"
RIVALS = ("SHiRA", "Super-Tuning", "LoRA, equal count", "LoRA r=16", "full")
VARIED = ("", *(f", {what}" for what, _, _ in VARIANTS))
PHASES = ("forward", "backward", "clip", "optimizer", "flush", "reference", "generation", "other")
Runs = Sequence[Mapping[str, Any]]


def ratios(own: Runs, reference: Runs, key: str) -> list[float]:
    """Return every round's ratio of a figure."""
    return [a[key] / b[key] for a, b in zip(own, reference, strict=True)]


def step_ratios(own: Runs, reference: Runs) -> list[float]:
    """Return every step's ratio of time."""
    pairs = [(a["steps_seconds"], b["steps_seconds"]) for a, b in zip(own, reference, strict=True)]
    return [x / y for mine, its in pairs for x, y in zip(mine, its, strict=True)]


def cost_row(
    method: Method, mode: str, accumulation: int, batch: int, runs: Runs, full: Runs | None
) -> dict[str, Any]:
    """Return the row of a method's finished rounds.

    Args:
        method: Which.
        mode: "fidelity" or "memory".
        accumulation: Forward passes a step.
        batch: Rows a forward pass.
        runs: A run a round.
        full: Full finetuning's, of the same companies; None where it did not run.
    """
    of = {key: median(run[key] for run in runs) for key in ("step_seconds", "peak_bytes")}
    last = runs[-1]
    of_first = ("checkpoint_bytes", "generation_seconds", "generation_merged_seconds")
    return {
        "method": method.name,
        "group": method.group,
        "mode": mode,
        "base_dtype": DTYPES[mode],
        "accumulation": accumulation,
        "batch": batch,
        "status": "measured",
        "trainable": last["trainable"],
        "state_bytes": last["state_bytes"],
        "state_per_parameter": stored(last) / last["parameters"],
        "expected_per_parameter": expected(method, mode, last),
        **of,
        "peak_ratio": median(ratios(runs, full, "peak_bytes")) if full else None,
        "step_ratio": median(step_ratios(runs, full)) if full else None,
        "step_ratio_range": middle_half(step_ratios(runs, full)) if full else None,
        "phases": {
            name: median(run["phases"][name] for run in runs)
            for name in PHASES
            if name in last["phases"]
        },
        **{key: runs[0][key] for key in of_first},
    }


def expected(method: Method, mode: str, run: Mapping[str, Any]) -> float | None:
    """Bytes a parameter that a mask's state should take, by the sizes of its parts."""
    if method.group != "masked":
        return None
    weight = {"fidelity": 4, "memory": 2}[mode]
    _, options = method.optimizer or (None, {})
    if options.get("master") == "residual":  # moments of a byte, their scales, the residual
        value, moments = 2.0, 2 + 2 * 4 / 256 + 1
    else:
        value, moments = 4.0, 8.0
    gradient = 0.0 if options.get("release_gradients") else value
    density = run["trainable"] / run["parameters"]
    return weight + density * (INDEX_BYTES + value + weight + gradient + moments)


def documented(method: Method, counts: Counts) -> dict[str, Any]:
    """The row of FlashOptim where there is no GPU: what its paper says."""
    return {
        "method": method.name,
        "group": method.group,
        "mode": "memory",
        "base_dtype": "bfloat16",
        "accumulation": 1,
        "status": "documented",
        "trainable": counts.parameters,
        "state_bytes": {"documented": round(FLASHOPTIM_BYTES * counts.parameters)},
        "state_per_parameter": FLASHOPTIM_BYTES,
    }


def missing(method: Method, mode: str, accumulation: int, status: str) -> dict[str, Any]:
    """The row of a method that did not run."""
    return {
        "method": method.name,
        "group": method.group,
        "mode": mode,
        "base_dtype": DTYPES[mode],
        "accumulation": accumulation,
        "status": status,
    }


def pairs(cost: Mapping[tuple[str, str, int], Runs]) -> list[dict[str, Any]]:
    """Set the mask of equal count against each rival, the reference had alike.

    Args:
        cost: (method, mode, accumulation) -> its rounds.
    """
    found = []
    for (name, mode, accumulation), own in cost.items():
        variant = name.removeprefix(MASKED)
        if not name.startswith(MASKED) or variant not in VARIED:
            continue
        for rival in RIVALS:
            its = cost.get((rival + variant, mode, accumulation))
            if not its or len(its) != len(own):
                continue
            steps = step_ratios(own, its)
            peaks = ratios(own, its, "peak_bytes")
            found.append(
                {
                    "method": name,
                    "against": rival + variant,
                    "mode": mode,
                    "accumulation": accumulation,
                    "step_ratio": median(steps),
                    "step_ratio_range": middle_half(steps),
                    "step_ratio_rounds": [
                        median(step_ratios([a], [b])) for a, b in zip(own, its, strict=True)
                    ],
                    "peak_ratio": median(peaks),
                    "peak_ratio_range": spread(peaks),
                    "state_ratio": stored(own[-1]) / stored(its[-1]),
                    "trainable_ratio": own[-1]["trainable"] / its[-1]["trainable"],
                }
            )
    return found


def stored(run: Mapping[str, Any]) -> int:
    """Bytes of the model's state, the reference model left out."""
    return sum(v for k, v in run["state_bytes"].items() if k not in ("reference", "buffers"))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the most."""
    return min(values), max(values)


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    # Of every value twice: a single one has quartiles too.
    low, _, high = quantiles([*values, *values], n=4, method="inclusive")
    return low, high


def best(trials: Mapping[float, Mapping[str, Any]], algorithm: str) -> float:
    """Return the learning rate whose run ended best in training."""
    sign = -1 if algorithm == "grpo" else 1
    finals = {rate: sign * run["final"] for rate, run in trials.items()}
    return min(finals, key=lambda rate: math.inf if math.isnan(finals[rate]) else finals[rate])


def learning_row(
    method: Method,
    trials: Mapping[float, Mapping[str, Any]],
    rate: float,
    runs: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what a method learned.

    Args:
        method: Which.
        trials: Learning rate -> its run at the first seed.
        rate: The one chosen.
        runs: Seed -> the run at that rate.
    """
    of = list(runs.values())
    row = {
        "method": method.name,
        "group": method.group,
        "base_dtype": DTYPES[method.learns_in],
        "trainable": of[0]["trainable"],
        "learning_rate": rate,
        "edge": rate in (min(trials), max(trials)),
        "trials": [
            {"learning_rate": r, "final": t["final"]} | t["heldout"] for r, t in trials.items()
        ],
        "seeds": list(runs),
        "final_loss": [run["final"] for run in of],
    }
    return row | {key: [run["heldout"][key] for run in of] for key in of[0]["heldout"]}


def show(report: Mapping[str, Any]) -> None:
    """Print every table."""
    console = Console(width=180)
    for mode in ("fidelity", "memory"):
        rows = [r for r in report["cost"] if r["mode"] == mode]
        if rows:
            tables = cost_table(mode, rows, report["settings"]["autocast"]), phase_table(mode, rows)
            console.print(*tables)
    if report["pairs"]:
        table = Table("masked random 5% against", "mode", "accumulation", title="At equal count")
        for name in ("step", "range", "peak", "range", "state", "trained"):
            table.add_column(name, justify="right")
        for p in report["pairs"]:
            table.add_row(
                p["against"],
                p["mode"],
                str(p["accumulation"]),
                f"{p['step_ratio']:.3f}",
                "{:.2f}-{:.2f}".format(*p["step_ratio_range"]),
                f"{p['peak_ratio']:.3f}",
                "{:.2f}-{:.2f}".format(*p["peak_ratio_range"]),
                f"{p['state_ratio']:.3f}",
                f"{p['trainable_ratio']:.3f}",
            )
        console.print(table)
    if report["learning"]:
        console.print(learning_table(report))


def cost_table(mode: str, rows: Runs, autocast: str | None) -> Table:
    """Memory and time."""
    titles = {
        "fidelity": f"Fidelity: fp32 weights, {autocast or 'no'} autocast",
        "memory": "Memory: a bf16 base",
    }
    table = Table(
        *("method", "acc.", "trained, M", "state, B/param", "formula", "reference, MB"),
        *("peak, MB", "ratio", "s/step", "ratio", "range", "checkpoint, MB"),
        *("generate, s", "merged"),
        title=titles[mode],
    )

    def number(value: Any, form: str, unit: float = 1) -> str:
        return "" if value is None else format(value / unit, form)

    for r in rows:
        low_high = r.get("step_ratio_range")
        table.add_row(
            r["method"] + ("" if r["status"] == "measured" else f" ({r['status']})"),
            str(r["accumulation"]),
            number(r.get("trainable"), ".2f", 1e6),
            number(r.get("state_per_parameter"), ".2f"),
            number(r.get("expected_per_parameter"), ".2f"),
            number(r.get("state_bytes", {}).get("reference"), ".0f", 1e6),
            number(r.get("peak_bytes"), ",.0f", 1e6),
            number(r.get("peak_ratio"), ".2f"),
            number(r.get("step_seconds"), ".3f"),
            number(r.get("step_ratio"), ".2f"),
            "{:.2f}-{:.2f}".format(*low_high) if low_high else "",
            number(r.get("checkpoint_bytes"), ",.1f", 1e6),
            number(r.get("generation_seconds"), ".2f"),
            number(r.get("generation_merged_seconds"), ".2f"),
        )
    return table


def phase_table(mode: str, rows: Runs) -> Table:
    """Where a step's time goes."""
    table = Table("method", "acc.", *PHASES, title=f"Seconds a step by phase, {mode}")
    for r in rows:
        if "phases" in r:
            figures = (r["phases"].get(name) for name in PHASES)
            cells = ("" if value is None else f"{value:.3f}" for value in figures)
            table.add_row(r["method"], str(r["accumulation"]), *cells)
    return table


def learning_table(report: Mapping[str, Any]) -> Table:
    """What was learned."""
    table = Table(
        *("method", "base", "trained, M", "lr", "training, mean", report["heldout_kind"]),
        *("mean", "margin"),
        title=f"Learned; before: {report['heldout_before']}",
    )
    for r in report["learning"]:
        margin = r.get("heldout_margin")
        table.add_row(
            r["method"],
            r["base_dtype"],
            f"{r['trainable'] / 1e6:.2f}",
            f"{r['learning_rate']:.2g}{' (edge)' if r['edge'] else ''}",
            f"{mean(r['final_loss']):.4f}",
            " ".join(f"{x:.3f}" for x in r["heldout"]),
            f"{mean(r['heldout']):.3f}",
            "" if margin is None else f"{mean(margin):.3f}",
        )
    return table
