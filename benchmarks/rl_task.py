"""Does GRPO on a mask learn what full GRPO learns? Against a random mask and LoRA, three seeds.

    python -m benchmarks.rl_task

`examples/grpo.py`, a process a run, all with the same steps and batch: every weight; the mask of a
prior full run (seed 100, not among those compared); as many entries of each tensor, drawn anew for
every seed; LoRA r=16 on all linear layers. Each method gets three learning rates at seed 0. The
one with the highest training reward over the last `LAST` steps is its own, and the other seeds
follow at that: held-out problems take no part in the choice. A choice at the end of its row is
marked. Beside them, outside the comparison: the mask at the full run's learning rate.

Runs that already lie under runs/rl_task are not made again. Writes benchmarks/results/rl_task.json
and benchmarks/figures/rl_task.png. With a core to itself a run takes three and a half minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.rl_task_compare import best_rate, draw, show, summarize
from subnet_ft import SubnetMask, extract_mask
from subnet_ft.selectors import random_like

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
PRIOR = ("prior", 3e-5, 100)
RATES = (1e-5, 3e-5, 1e-4)
LEARNING_RATES = {
    "full": RATES,
    "masked": RATES,
    "random mask": RATES,
    "LoRA r=16": (1e-4, 3e-4, 1e-3),
}
Run = tuple[str, float, int]


def main() -> None:
    """Make the runs that are missing, then summarize and draw all there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "rl_task")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--summary", action="store_true", help="of what there is; no new run")
    options = parser.parse_args()
    if not options.summary:
        make_all(options.runs, options.jobs)
    summary = summarize(finished(options.runs), LEARNING_RATES, SEEDS)
    summary["mask"] = describe(options.runs / "mask.safetensors")
    (options.output / "results" / "rl_task.json").write_text(json.dumps(summary) + "\n")
    draw(summary, options.output / "figures" / "rl_task.png")
    show(summary)


def make_all(runs: Path, jobs: int) -> None:
    """Make the prior run and its masks, a trial of every learning rate, then the other seeds."""
    with ThreadPoolExecutor(jobs) as pool:

        def make(wanted: list[Run]) -> None:
            list(pool.map(lambda run: train(runs, run), wanted))

        trials = [(m, rate, SEEDS[0]) for m, rates in LEARNING_RATES.items() for rate in rates]
        make([PRIOR, *(run for run in trials if "mask" not in run[0])])
        make_masks(runs)
        make(trials)
        rates = {m: best_rate(finished(runs), m, SEEDS[0]) for m in LEARNING_RATES}
        make([(m, rates[m], seed) for seed in SEEDS[1:] for m in LEARNING_RATES])
        make([("masked", rates["full"], seed) for seed in SEEDS])


def make_masks(runs: Path) -> None:
    """Extract the prior run's mask; draw a random one like it for every seed."""
    path = runs / "mask.safetensors"
    if not path.exists():
        start = json.loads((folder(runs, PRIOR) / "run.json").read_text())["start"]
        extract_mask(start, folder(runs, PRIOR), output=path)
    for seed in SEEDS:
        random_mask = random_like(SubnetMask.load(path), seed=seed)
        random_mask.save(runs / f"random_mask_{seed}.safetensors", overwrite=True)


def train(runs: Path, run: Run) -> None:
    """Make one run in a process of its own, unless it is there."""
    method, rate, seed = run
    output = folder(runs, run)
    if (output / "run.json").exists():
        return
    extra = {
        "masked": ["--mask", str(runs / "mask.safetensors")],
        "random mask": ["--mask", str(runs / f"random_mask_{seed}.safetensors")],
        "LoRA r=16": ["--lora"],
    }.get(method, [])
    command = [sys.executable, str(ROOT / "examples" / "grpo.py"), "--output", str(output)]
    command += ["--learning-rate", str(rate), "--seed", str(seed), *extra]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("w") as log:
        # A thread each: two runs side by side get more from two cores than one run with both.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=env, stdout=log, stderr=subprocess.STDOUT)
    if method != "prior":  # whose weights the mask is taken from
        for weights in output.glob("*.safetensors"):
            weights.unlink()
    print(log_line(output), flush=True)


def folder(runs: Path, run: Run) -> Path:
    """Where a run lies."""
    method, rate, seed = run
    return runs / f"{method.replace(' ', '-')}_{rate:g}_{seed}"


def log_line(output: Path) -> str:
    """The last line a run printed."""
    return (output / "log.txt").read_text().splitlines()[-1]


def finished(runs: Path) -> dict[Run, dict[str, Any]]:
    """Read every run that is complete."""
    found = {}
    for path in sorted(runs.glob("*/run.json")):
        method, rate, seed = path.parent.name.split("_")
        found[method.replace("-", " "), float(rate), int(seed)] = json.loads(path.read_text())
    return found


def describe(path: Path) -> dict[str, Any]:
    """What to know of the mask."""
    mask = SubnetMask.load(path)
    prior = dict(zip(("method", "learning_rate", "seed"), ("full", *PRIOR[1:]), strict=True))
    return {"density": mask.density, "entries": mask.nnz, "from": prior}


if __name__ == "__main__":
    main()
