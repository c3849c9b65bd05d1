"""Full finetuning against masked finetuning and its rivals, on your model: cost and learning.

    python -m benchmarks.full_vs_masked                           # SmolLM2-135M, DPO
    python -m benchmarks.full_vs_masked --quick                   # a 3M-parameter model, SFT
    python -m benchmarks.full_vs_masked --model MODEL --algo grpo --stage cost

MODEL is a directory or a hub id of any causal language model. Every run is TRL's own trainer in a
process of its own (`full_vs_masked_run`); a method is an entry of `full_vs_masked_methods`.

Cost: methods take turns, a step each, some at a time (`turns`); a ratio is the median over steps of
that step's ratio to full finetuning's. The pace of two processes with the same work differs too, so
that what is compared at equal count runs in several rounds of new ones. On a GPU, where not several
fit, all run so, one after the other. One table has fp32 weights under bf16 autocast (fidelity), one
a bf16 base (memory). On a processor that has no products in bf16 the first is computed in fp32, and
what has a bf16 base, many times slower there, runs only with `--modes memory`.
Learning: as many learning rates a method, chosen by training loss (reward) at one seed, then
further seeds; held-out figures take no part in the choice. A mask is found by a full run at a seed
that is not compared.

Finished runs lie under --runs and are not made again. Writes
benchmarks/results/full_vs_masked_<algo>.json (`_quick` with --quick) and prints tables.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.full_vs_masked_data import SMALL
from benchmarks.full_vs_masked_methods import all_methods
from benchmarks.full_vs_masked_report import HELD_OUT, RULE, pairs, show
from benchmarks.full_vs_masked_run import multiplies_bf16
from benchmarks.full_vs_masked_stages import ACCUMULATION, Bench

ROOT = Path(__file__).parent.parent
EIGHT = [
    "full",
    "masked found",
    "masked random 5%",
    "masked random 5%, small state",
    "LoRA r=16",
    "SHiRA",
    "Super-Tuning",
    "middle third",
]
LEARN = [
    "full",
    "masked found",
    "masked random 5%",
    "LoRA r=16",
]
ACCUMULATED = ["full", "masked random 5%", "LoRA r=16"]
DEFAULTS: dict[str, Any] = {
    "model": "SmolLM2-135M", "algo": "dpo", "methods": None, "learn": LEARN,
    "accumulated": ACCUMULATED, "steps": 14, "batch": None, "rate": 1e-5,
    "learn_steps": 20, "learn_batch": None, "seeds": 2, "trials": 3, "factors": {},
}  # fmt: skip
QUICK: dict[str, Any] = DEFAULTS | {
    "model": SMALL, "algo": "sft", "methods": EIGHT, "learn": EIGHT, "accumulated": [],
    "steps": 16, "batch": 128, "rate": 1e-3, "learn_steps": 150, "learn_batch": 16,
    "factors": {"LoRA r=16": 5, "masked found": 1},
}  # fmt: skip
TOGETHER, ROUNDS, ROUNDS_ALONE = 6, 8, 3
BATCHES = {"sft": 8, "dpo": 4, "grpo": 32}


def main() -> None:
    """Make the runs that are missing; write the file and print the tables of all there are."""
    options = parse_options()
    logging.disable_progress_bar()
    if not multiplies_bf16():
        print("This processor has no products in bf16: fp32 weights are computed with in fp32.")
        if "memory" not in options.modes:
            print("What has a bf16 base is left out: --modes memory has it emulated, and slow.")
    bench = Bench(options)
    started = time.perf_counter()
    scout = bench.find_masks()
    cost, rows = bench.cost() if options.stage != "learning" else ({}, [])
    learning, before = bench.learning() if options.stage != "cost" else ([], None)
    report = {
        "machine": bench.machine(),
        "settings": bench.settings() | {"scout": scout, "rule": RULE},
        "cost": rows,
        "pairs": pairs(cost),
        "learning": learning,
        "heldout_kind": HELD_OUT[options.algo],
        "heldout_before": before,
        "seconds": time.perf_counter() - started,
    }
    name = "quick" if options.quick else options.algo
    path = options.output / f"full_vs_masked_{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    print(f"Wrote {path} in {report['seconds']:.0f} s.")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="eight methods on a 3M-parameter model")
    add("--model", help="directory, hub id, 'small', or 'SmolLM2-135M'")
    add("--algo", choices=["sft", "dpo", "grpo"])
    add("--stage", choices=["both", "cost", "learning"], default="both")
    add("--methods", nargs="+", help="of the cost stage; all by default")
    add("--learn", nargs="+", help="methods of the learning stage")
    add("--accumulated", nargs="*", help=f"methods also timed at accumulation {ACCUMULATION}")
    add(
        "--modes",
        nargs="+",
        choices=["fidelity", "memory"],
        help="tables of the cost stage; both, the first alone without products in bf16",
    )
    add(
        "--rounds",
        type=int,
        help=f"of what is compared; {ROUNDS}, 1 with --quick, {ROUNDS_ALONE} alone",
    )
    add("--together", type=int, help=f"runs taking turns, all in memory; {TOGETHER}, 1 on a GPU")
    add("--steps", type=int, help="of a run of the cost stage, two of them not timed")
    add("--batch", type=int, help="rows a forward pass of the cost stage")
    add("--rate", type=float, help="the middle of full finetuning's learning rates")
    add("--trials", type=int, help="learning rates a method")
    add("--learn-steps", type=int)
    add("--learn-batch", type=int)
    add("--seeds", type=int, help="of the learning stage")
    add("--jobs", type=int, help="learning runs at a time; by default one a core, one on a GPU")
    add("--mask", type=Path, help="of a prior run, in place of the one this script would make")
    add("--runs", type=Path, default=ROOT / "runs" / "full_vs_masked")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    if options.modes is None:
        options.modes = ["fidelity", "memory"] if multiplies_bf16() else ["fidelity"]
    options.together = options.together or (1 if torch.cuda.is_available() else TOGETHER)
    in_turn = 1 if options.quick else ROUNDS
    options.rounds = options.rounds or (ROUNDS_ALONE if options.together == 1 else in_turn)
    options.batch = options.batch or BATCHES[options.algo]
    options.learn_batch = options.learn_batch or BATCHES[options.algo]
    options.jobs = options.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    known = all_methods()
    for name in [*(options.methods or []), *options.learn, *options.accumulated]:
        if name not in known:
            parser.error(f"expected methods among {sorted(known)}, found {name!r}")
    return options


if __name__ == "__main__":
    main()
