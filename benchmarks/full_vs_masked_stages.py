"""The stages of `benchmarks/full_vs_masked.py`: runs, made or found, and the rows they give."""

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import subnet_ft
from benchmarks.full_vs_masked_data import model_path
from benchmarks.full_vs_masked_methods import Counts, Method, all_methods
from benchmarks.full_vs_masked_report import (
    MASKED,
    RIVALS,
    VARIED,
    best,
    cost_row,
    documented,
    learning_row,
    missing,
)
from benchmarks.full_vs_masked_run import Spec, counts_of, multiplies_bf16
from benchmarks.optimizer import machine
from benchmarks.turns import take_turns
from subnet_ft import SubnetMask, extract_mask

ROOT = Path(__file__).parent.parent
Cell = tuple[Method, str, int]  # a row of the cost stage: method, mode, accumulation
Key = tuple[str, str, int]  # the same, by the method's name
SCOUT_SEED = 100
ACCUMULATION = 16
# A found mask of a budget costs what a random one does.
NOT_TIMED = {f"masked found {d}%" for d in ("0.5", "2", "20")}
# Everything is on disk by now: no library need ask the network for anything.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Bench:
    """The runs of one command line.

    Args:
        options: See `parse_options`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = model_path(options.model, options.algo)
        self.counts: Counts = counts_of(str(self.model))
        self.methods = all_methods()
        self.runs = options.runs / f"{self.model.name}-{options.algo}"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.threads = torch.get_num_threads()
        self.mask: Path | None = options.mask

    def specify(self, method: Method, mode: str, **more: Any) -> Spec:
        """Return a run of the cost stage; ``more`` changes it."""
        o = self.options
        given: dict[str, Any] = {
            "steps": o.steps,
            "warmup": 2,
            "batch": o.batch,
            "accumulation": 1,
            "learning_rate": self.rate_of(method),
            "seed": 0,
            "threads": self.threads,
            "mask": str(self.mask_of(method)) if method.found else None,
        }
        return Spec(str(self.model), o.algo, method.name, mode, **given | more)

    def run(self, spec: Spec) -> dict[str, Any]:
        """Return a run's figures, made now where there are none; "failed" if it did."""
        output = self.output_of(spec)
        if not output.exists():
            with output.with_suffix(".log").open("w") as log:
                subprocess.run(**child(spec, output), stdout=log, stderr=subprocess.STDOUT)
        return figures_of(spec, output)

    def run_together(self, specs: list[Spec]) -> list[dict[str, Any]]:
        """Do `run` with a company, whose runs take turns; where one is missing, with all of it."""
        if len(specs) == 1:
            return [self.run(specs[0])]
        outputs = [self.output_of(spec) for spec in specs]
        if not all(output.exists() for output in outputs):
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            with ExitStack() as stack:
                children = []
                for spec, output in zip(specs, outputs, strict=True):
                    log = stack.enter_context(output.with_suffix(".log").open("w"))
                    process = subprocess.Popen(**child(spec, output), stderr=log, **pipes)
                    children.append(stack.enter_context(process))
                take_turns(children)
        return [figures_of(spec, output) for spec, output in zip(specs, outputs, strict=True)]

    def output_of(self, spec: Spec) -> Path:
        """Where a run's figures lie, which are a machine's."""
        key = describe(spec) + json.dumps(self.machine(), sort_keys=True)
        return self.runs / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def find_masks(self) -> dict[str, Any] | None:
        """Make the prior run and its masks, if a method needs them; describe them."""
        o = self.options
        stages = {"cost": self.timed(), "learning": self.learners()}
        needed = [m for stage, of in stages.items() if o.stage in ("both", stage) for m in of]
        needed = [m for m in needed if m.found]
        if not needed:
            return None
        prior = self.prior_run
        if self.mask is None:
            spec = self.specify(
                self.methods["full"],
                "fidelity",
                steps=o.learn_steps,
                batch=o.learn_batch,
                learning_rate=o.rate,
                seed=SCOUT_SEED,
                save=str(prior),
            )
            if "failed" in self.run(spec):
                raise SystemExit("The prior run failed: no mask can be found. Give --mask.")
            self.mask = prior.with_name(f"{prior.name}.safetensors")
            if not self.mask.exists():
                extract_mask(self.model, prior, output=self.mask)
        linear = [re.escape(name) for name in self.counts.linear]
        for keep in sorted({m.keep for m in needed if m.keep is not None}):
            path = self.budget(keep)
            if not path.exists():
                if not prior.is_dir():
                    raise SystemExit("--mask has no budgets: leave out the methods 'found ...%'.")
                density = self.counts.masked(keep)
                extract_mask(self.model, prior, keep=density, include=linear, output=path)
        mask = SubnetMask.load(self.mask)
        origin = {"given": True} if o.mask else {"steps": o.learn_steps, "learning_rate": o.rate}
        return {"density": mask.density, "entries": mask.nnz, "seed": SCOUT_SEED} | origin

    def mask_of(self, method: Method) -> Path | None:
        """Which mask file a method trains."""
        return self.mask if method.keep is None else self.budget(method.keep)

    @property
    def prior_run(self) -> Path:
        """Where the run lies whose mask is found."""
        o = self.options
        return self.runs / f"prior-{o.learn_steps}x{o.learn_batch}-{o.rate:g}"

    def budget(self, keep: float) -> Path:
        """The mask of the prior run's largest changes."""
        return self.prior_run.with_name(f"{self.prior_run.name}.{keep:g}.safetensors")

    def rate_of(self, method: Method) -> float:
        """The middle of a method's learning rates."""
        factor = self.options.factors.get(method.name, method.rate)
        return float(self.options.rate * factor)

    def timed(self) -> list[Method]:
        """Methods of the cost stage."""
        names = self.options.methods or [n for n in self.methods if n not in NOT_TIMED]
        return [m for m in map(self.methods.get, names) if m and self.options.algo in m.algorithms]

    def learners(self) -> list[Method]:
        """Methods of the learning stage."""
        bf16 = multiplies_bf16() or "memory" in self.options.modes
        methods = (self.methods[name] for name in self.options.learn)
        methods = (m for m in methods if bf16 or m.learns_in == "fidelity")
        return [m for m in methods if m.installed and self.options.algo in m.algorithms]

    def cost(self) -> tuple[dict[Key, list[Any]], list[dict[str, Any]]]:
        """Time and weigh every method; return its rounds, and the rows."""
        o = self.options
        cells = [(m, mode, 1) for mode in o.modes for m in self.timed() if mode in m.modes]
        accumulated = "memory" if "memory" in o.modes else "fidelity"
        of = [m for m in map(self.methods.__getitem__, o.accumulated) if accumulated in m.modes]
        cells += [(m, accumulated, ACCUMULATION) for m in of]
        rows: dict[Key, dict[str, Any]] = {}
        rounds: dict[Key, list[Any]] = {}
        for cell in cells:
            if cell[0].documented:
                rows[key_of(cell)] = documented(cell[0], self.counts)
            elif not cell[0].installed:
                rows[key_of(cell)] = missing(*cell, "not installed")
        for number in range(o.rounds):
            left = [cell for cell in cells if key_of(cell) not in rows]
            if number and o.together > 1:
                left = [cell for cell in left if has_further_rounds(cell)]
            for company in companies(left, o.together):
                for cell, figures in self.keep_company(company, number, rounds):
                    say(number, key_of(cell), figures)
                    if "failed" in figures:
                        rows[key_of(cell)] = missing(*cell, "failed")
        for cell in cells:
            if (key := key_of(cell)) not in rows:
                batch = o.batch if cell[2] == 1 else self.micro_batch()
                full = [run["full"] for run in rounds[key]]
                rows[key] = cost_row(*cell, batch, rounds[key], full if all(full) else None)
        return rounds, [rows[key_of(cell)] for cell in cells]

    def keep_company(
        self, company: list[Cell], number: int, rounds: dict[Key, list[Any]]
    ) -> list[tuple[Cell, dict[str, Any]]]:
        """Run a company; add each one's figures, and full finetuning's beside, to its rounds."""
        # So that no one's step always follows the same other's: turning the row would not do.
        company = random.Random(number).sample(company, len(company))
        names = tuple(method.name for method, *_ in company) if len(company) > 1 else ()
        specs = [self.cost_spec(*cell, number, names) for cell in company]
        found = list(zip(company, self.run_together(specs), strict=True))
        of_round = {key: runs[number] for key, runs in rounds.items() if len(runs) > number}
        of_company = {key_of(cell): figures for cell, figures in found if "failed" not in figures}
        for key, figures in of_company.items():
            if key not in of_round:  # full finetuning is in every company
                full = (of_round | of_company).get(("full", *key[1:]))
                rounds.setdefault(key, []).append(figures | {"full": full})
        return found

    def micro_batch(self) -> int:
        """Rows a forward pass where gradients accumulate."""
        return max(1, self.options.batch // 4)

    def cost_spec(
        self, method: Method, mode: str, accumulation: int, number: int, company: tuple[str, ...]
    ) -> Spec:
        """Return a run of the cost stage; with accumulation, fewer and smaller steps."""
        more: dict[str, Any] = {"round": number, "company": company}
        if accumulation > 1:
            more |= {"accumulation": accumulation, "batch": self.micro_batch()}
            more |= {"steps": max(2, self.options.steps // 2), "warmup": 1}
        return self.specify(method, mode, **more)

    def learning(self) -> tuple[list[dict[str, Any]], float | None]:
        """Tune and train every method; return the rows, and the held-out figure of the base."""
        o, methods = self.options, {m.name: m for m in self.learners()}
        around = [10 ** ((i - (o.trials - 1) / 2) / 2) for i in range(o.trials)]
        rates = {name: [self.rate_of(m) * r for r in around] for name, m in methods.items()}
        with ThreadPoolExecutor(o.jobs) as pool:

            def make(wanted: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], Any]:
                return dict(
                    zip(wanted, pool.map(lambda run: self.learn(*run), wanted), strict=True)
                )

            runs = make([(name, rate, 0) for name in methods for rate in rates[name]])
            trials = {name: {rate: runs[name, rate, 0] for rate in rates[name]} for name in methods}
            chosen = {name: best(trials[name], o.algo) for name in methods}
            seeds = range(1, o.seeds)
            runs |= make([(name, chosen[name], seed) for seed in seeds for name in methods])
        rows = [
            learning_row(
                method,
                trials[name],
                chosen[name],
                {seed: runs[name, chosen[name], seed] for seed in (0, *seeds)},
            )
            for name, method in methods.items()
        ]
        if o.algo == "dpo":  # a model's margins to itself are 0 by definition
            return rows, None
        return rows, self.learn("full", o.rate, 0, steps=0)["heldout"]["heldout"]

    def learn(self, name: str, rate: float, seed: int, **more: Any) -> dict[str, Any]:
        """Make one run of the learning stage."""
        o, method = self.options, self.methods[name]
        threads = max(1, self.threads // o.jobs)
        given: dict[str, Any] = {"steps": o.learn_steps, "batch": o.learn_batch, "evaluate": True}
        given |= {"learning_rate": rate, "seed": seed, "threads": threads}
        figures = self.run(self.specify(method, method.learns_in, **given | more))
        if "failed" in figures:
            raise SystemExit(f"{name}: {figures['failed']}")
        what = f"{name}, lr {rate:.2g}, seed {seed}"
        print(f"{what}: {figures.get('final')}, {figures['heldout']}", flush=True)
        return figures

    def machine(self) -> dict[str, Any]:
        """What the figures were taken on."""
        names = ("trl", "accelerate", "bitsandbytes")
        versions = {name: importlib.metadata.version(name) for name in names}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        own = {"subnet-ft": subnet_ft.__version__, "threads": self.threads, "device": device}
        return machine() | versions | own

    def settings(self) -> dict[str, Any]:
        """What to write beside the figures."""
        o = self.options
        learned = {
            "methods": [m.name for m in self.learners()],
            "steps": o.learn_steps,
            "batch": o.learn_batch,
        }
        learned |= {"seeds": list(range(o.seeds)), "trials": o.trials, "jobs": o.jobs}
        return {
            "model": self.model.name,
            "parameters": self.counts.parameters,
            "linear_parameters": self.counts.linear_parameters,
            "equal_count": self.counts.equal,
            "equal_rank": self.counts.rank,
            "algo": o.algo,
            "autocast": "bfloat16" if multiplies_bf16() else None,
            "batch": o.batch,
            "rounds": o.rounds,
            "together": o.together,
            "steps": o.steps,
            "warmup": 2,
            "learning": None if o.stage == "cost" else learned,
        }


def companies(cells: list[Cell], size: int) -> list[list[Cell]]:
    """Split the cost stage into companies whose runs take turns, full finetuning in each.

    Those of one table whose ratios to one another are stated come together, if they fit.

    Args:
        cells: All.
        size: Of a company; 1: every run for itself.
    """
    tables: dict[Any, list[Cell]] = {}
    for cell in cells:
        kind = (*key_of(cell)[1:], variant_of(cell), is_compared(cell))
        tables.setdefault(kind, []).append(cell)
    split = []
    for (mode, accumulation, *_), table in tables.items():
        full = [c for c in cells if key_of(c) == ("full", mode, accumulation)]
        guests = full if size > 1 and table != full else []
        own = [cell for cell in table if cell not in guests]
        room = size - len(guests)
        split += [guests + own[i : i + room] for i in range(0, len(own), room)]
    return split


def is_compared(cell: Cell) -> bool:
    """Whether its ratio to the mask of equal count, or the mask's to it, is stated."""
    return cell[0].name.removesuffix(variant_of(cell)) in {MASKED, *RIVALS}


def has_further_rounds(cell: Cell) -> bool:
    """Whether it runs more than once: what is compared, as a trainer would have it by itself."""
    return is_compared(cell) and not variant_of(cell) and cell[2] == 1


def variant_of(cell: Cell) -> str:
    """Return the end of a method's name that says how it has its reference."""
    return next((v for v in VARIED if v and cell[0].name.endswith(v)), "")


def key_of(cell: Cell) -> Key:
    """Name a cell."""
    return cell[0].name, *cell[1:]


def describe(spec: Spec) -> str:
    """Write a specification as JSON."""
    return json.dumps(asdict(spec), sort_keys=True)


def child(spec: Spec, output: Path) -> dict[str, Any]:
    """How a process of a run is started."""
    specification = output.with_suffix(".spec")
    specification.write_text(describe(spec))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.full_vs_masked_run"]
    return {
        "args": [*command, str(specification), str(output)],
        "cwd": ROOT,
        "env": os.environ | QUIET | {"OMP_NUM_THREADS": str(spec.threads)},
    }


def figures_of(spec: Spec, output: Path) -> dict[str, Any]:
    """Read the figures of a run that has ended; "failed" if there are none."""
    if not output.exists():
        log = output.with_suffix(".log")
        print(f"{spec.method}, {spec.mode}: failed, see {log}", flush=True)
        return {"failed": log.read_text().strip().splitlines()[-1:]}
    figures: dict[str, Any] = json.loads(output.read_text())
    return figures


def say(number: int, key: Key, figures: dict[str, Any]) -> None:
    """Print a line a run."""
    name, mode, accumulation = key
    what = f"round {number + 1}: {name}, {mode}, accumulation {accumulation}"
    if "failed" not in figures:
        mega = figures["peak_bytes"] / 1e6
        print(f"{what}: {figures['step_seconds']:.3f} s, peak {mega:,.0f} MB", flush=True)
