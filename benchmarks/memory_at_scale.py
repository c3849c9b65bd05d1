"""How much memory does training take at the scale users have? Traced with the real code.

    python -m benchmarks.memory_at_scale [MODEL ...]

One step of each way to train, on models of 8B to 70B parameters, is traced on tensors that have a
shape and no memory (`subnet_ft.plan`); DPO on one pair of 1024 tokens with gradient checkpointing
everywhere, SFT and GRPO (8 completions) on Qwen3-8B as well. Rows of Qwen3-8B under DPO are traced
with all of its layers; the rest from two short models, which is held against the former.

The tracer is held against a real step of SmolLM2-135M's shapes on the CPU: the storages that stay,
to the byte, and the most a step needs beyond them by torch's profiler.

Writes benchmarks/results/memory_at_scale.json and prints tables; with MODELs named, the rows of the
others stay.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig, logging

from benchmarks.common import transient_bytes
from benchmarks.optimizer import machine
from subnet_ft.plan import comparison, footprint, search, steps
from subnet_ft.plan.comparison import RIVALS, Row
from subnet_ft.plan.methods import Method
from subnet_ft.plan.models import load_config
from subnet_ft.plan.steps import Setting

RESULTS = Path(__file__).parent / "results" / "memory_at_scale.json"
GPUS = (24, 48, 80)
DENSITIES = (0.01, 0.05, 0.2)
SMALL_MODELS, LARGE_MODELS = ("Qwen3-8B", "Llama-3.1-8B"), ("Qwen3-30B-A3B", "Llama-3.1-70B")
DPO = Setting("dpo", 1, 1024, reference=True)
OTHERS = (Setting("sft", 1, 1024), Setting("grpo", 8, 1024))
LEFT_OUT = {
    ("Qwen3-30B-A3B", "full, AdamW, fp32 master"): "torch's grouped product takes no fp32 experts "
    "under autocast",
}
MASKED = [method for density in DENSITIES for method in comparison.masked(density)]
METHODS = [*MASKED, Method("masked", density=0.05, weight_grad="compact"), *RIVALS]
CHECKED = (
    (Method("masked", density=0.05), Setting("dpo", 1, 256, reference=True)),
    (Method("full"), Setting("dpo", 1, 256, reference=True)),
    (Method("masked", density=0.05), Setting("sft", 1, 512, checkpointing=False)),
    (Method("lora", rank=16), Setting("sft", 1, 512, checkpointing=False)),
)


def main() -> None:
    """Trace, check, write the file, print the tables."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    models = sys.argv[1:]
    report: dict[str, Any] = {
        "machine": machine() | {"trl": version("trl")},
        "assumptions": comparison.ASSUMPTIONS,
        "gpus_gib": GPUS,
        "usable_bytes": {str(gib): search.budget(gib) for gib in GPUS},
        "left_out": [{"model": m, "method": n, "why": why} for (m, n), why in LEFT_OUT.items()],
        "rows": [],
        "verified": [],
        "largest_density": [],
        "sentences": [],
    }
    if models:
        kept = json.loads(RESULTS.read_text())
        for part in ("rows", "largest_density", "sentences"):
            report[part] = [row for row in kept[part] if row["model"] not in models]
        report["verified"] = kept["verified"]
    for model in models or (*SMALL_MODELS, *LARGE_MODELS):
        config = load_config(model)
        complete = model == SMALL_MODELS[0]
        methods = [m for m in METHODS if (model, m.name) not in LEFT_OUT]
        found = list(traced(config, methods, DPO, complete=complete))
        report["rows"] += [as_dict(model, row, complete=complete) for row in found]
        if complete:
            report["verified"] = [verify(config, row) for row in found]
            for setting in OTHERS:
                rows = traced(config, methods, setting, complete=False)
                report["rows"] += [as_dict(model, row, complete=False) for row in rows]
        if model in SMALL_MODELS:
            by_state = [
                comparison.densest(config, method, DPO, GPUS, found)
                for method in comparison.masked(DENSITIES[0])
            ]
            for gib, *fits in zip(GPUS, *by_state, strict=True):
                place = {"model": model, "algorithm": "dpo", "gpu_gib": gib}
                report["largest_density"] += [place | fit.as_dict() for fit in fits]
                report["sentences"].append(place | {"text": comparison.sentence(gib, fits, found)})
        write(report)
    report["check"] = [check(method, setting) for method, setting in CHECKED]
    write(report)
    show(report)


def traced(
    config: PretrainedConfig, methods: Sequence[Method], setting: Setting, *, complete: bool
) -> Iterator[Row]:
    """Trace methods; `complete`: with all layers."""
    trace = footprint.trace if complete else footprint.trace_short
    for method in methods:
        yield from comparison.rows(config, method, setting, trace)


def as_dict(model: str, row: Row, *, complete: bool) -> dict[str, Any]:
    """Return a row with its model and what it fits on."""
    fits = {str(gib): row.fits(gib) for gib in GPUS}
    how = "all layers" if complete else "two depths"
    return {"model": model, **row.as_dict(), "fits": fits, "traced": how}


def verify(config: PretrainedConfig, row: Row) -> dict[str, Any]:
    """Return how far a trace of two short models is from a complete one."""
    short, whole = footprint.trace_short(config, row.method, row.setting), row.footprint
    return {
        "method": row.label,
        "peak_difference_bytes": short.peak - whole.peak,
        "state_difference_bytes": short.model_state - whole.model_state,
    }


def check(method: Method, setting: Setting) -> dict[str, Any]:
    """Trace a step of SmolLM2-135M's shapes on the CPU, take it, and compare."""
    config = load_config("SmolLM2-135M")
    expected = footprint.trace(config, method, setting, "cpu")
    model, reference, optimizer = footprint.build(config, method, setting, "cpu")
    footprint.first_step([p for p in model.parameters() if p.requires_grad], optimizer)
    transient = transient_bytes(
        lambda: steps.run(
            setting, model, reference, optimizer, lambda phase: None, clips=method.clips
        )
    )
    kept = sum(footprint.state_of(model, reference, optimizer).values())
    expected_kept = sum(expected.state.values())
    return {
        "method": method.name,
        "algorithm": setting.algorithm,
        "checkpointing": setting.checkpointing,
        "length": setting.length,
        "kept_bytes": expected_kept,
        "kept_measured_bytes": kept,
        "transient_bytes": expected.peak - expected_kept,
        "transient_measured_bytes": transient,
        "transient_error": (expected.peak - expected_kept) / transient - 1,
        "peak_error": expected.peak / (kept + transient) - 1,
    }


def write(report: dict[str, Any]) -> None:
    """Write the file, under another name first."""
    report["cpu_seconds"] = round(time.process_time())
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(RESULTS)


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table("model", "algorithm", "method", "reference", "state, B", "GiB", *map(str, GPUS))
    for row in report["rows"]:
        table.add_row(
            row["model"],
            row["algorithm"],
            row["method"],
            row["reference"],
            f"{row['state_bytes_per_parameter']:.2f}",
            f"{row['peak_bytes'] / search.GIB:.1f}",
            *("yes" if row["fits"][str(gib)] else "no" for gib in GPUS),
        )
    console = Console(width=150)
    console.print(table)
    for said in report["sentences"]:
        console.print(f"{said['model']}, DPO: {said['text']}")
    for row in report["check"]:
        console.print(f"{row['method']}, {row['algorithm']}: peak {row['peak_error']:+.2%}")


if __name__ == "__main__":
    main()
