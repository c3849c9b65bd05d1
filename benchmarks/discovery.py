"""Does a mask found in a run's first steps serve? Against a random and a prior run's, three seeds.

    python -m benchmarks.discovery

The Llama and the sums of `benchmarks/small_state.py`, in fp32: pretrained on two terms, finetuned
on three for 200 steps of 16 rows, by the stock Trainer with AdamW, linear decay and clipping at 1;
every mask has 2% of each linear layer:

- random, of each seed;
- prior: the largest |tuned - base| of the seed's own full run;
- found: by `SubnetDiscoveryCallback(20)`, so that 180 steps are left to train it;
- gradients: in its place, the largest sums of the gradients at the base over those 20 steps;
- SGD: the largest drift of plain SGD at a rate of 0.1 over those 20 steps, where training goes on
  from the base, or ("kept") from where SGD left the entries.

Each gets four learning rates at seed 0; the one with the lowest training loss over the last 20
steps is its own, and the other seeds follow at that. Held-out loss takes no part in it. Beside the
losses: how many entries of the three kinds of masks are among the prior's, where 2% is chance.

Then what is stored, in both phases, of a bf16 model of SmolLM2-135M's shapes.

Writes benchmarks/results/discovery.json and prints a table.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.optimizer import machine, smollm2
from benchmarks.small_state import heldout_loss, llama, pretrained, sums
from subnet_ft import SubnetCallback, SubnetDiscoveryCallback, SubnetMask
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.adapter.writing import read_entries
from subnet_ft.selectors import largest_entries, random

RESULTS = Path(__file__).parent / "results" / "discovery.json"
SEEDS = (0, 1, 2)
STEPS, FIND, BATCH, KEEP, LAST = 200, 20, 16, 0.02, 20
SGD, SIGNS = (0.01, 0.1, 0.5), (1e-4, 4e-4, 1e-3, 1.6e-3)
MASKED = (4e-3, 1.6e-2, 6.4e-2, 0.256)
LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "full": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "random": MASKED,
    "prior": MASKED,
    "found": MASKED,
    "gradients": MASKED,
    "SGD": MASKED,
    "SGD, kept": MASKED,
}
Weights = dict[str, torch.Tensor]


def main() -> None:
    """Train everything, write the file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where finished runs lie and are not made again")
    work = parser.parse_args().work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    base = cached(work / "base.pt", lambda: pretrained(600, lambda: None))
    base = {name: weight.float() for name, weight in base.items()}
    rows, overlaps = [], []
    for name, rates in LEARNING_RATES.items():
        trials = {rate: run(work, base, name, rate, 0) for rate in rates}
        rate = min(trials, key=lambda r: trials[r]["train"])
        runs = [trials[rate], *(run(work, base, name, rate, seed) for seed in SEEDS[1:])]
        rows.append(
            {
                "what": name,
                "learning_rate": rate,
                "at_the_end_of_its_row": rate in (rates[0], rates[-1]),
                "heldout": [r["heldout"] for r in runs],
                "train": [r["train"] for r in runs],
                "trials": {f"{r:g}": (t["train"], t["heldout"]) for r, t in trials.items()},
            }
        )
    kinds = [("gradients", 0.0), *(("SGD", r) for r in SGD), *(("signs", r) for r in SIGNS)]
    for what, rate in kinds:
        shares = [overlap(work, base, what, rate, seed) for seed in SEEDS]
        overlaps.append({"what": f"{what} {rate:g}", "among_the_prior_s": shares, "chance": KEEP})
    report = {
        "machine": machine() | {"threads": torch.get_num_threads()},
        "settings": {"seeds": SEEDS, "steps": STEPS, "find": FIND, "batch": BATCH, "keep": KEEP}
        | {"parameters": llama().num_parameters(), "sgd": SGD, "last": LAST},
        "heldout_before": heldout_loss(model_of(base)),
        "rows": rows,
        "overlaps": overlaps,
        "bytes": stored(),
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("mask", "learning rate", "held-out loss", "train loss")
    for row in rows:
        losses = [
            f"{mean(row[k]):.3f} ({', '.join(f'{v:.3f}' for v in row[k])})"
            for k in ("heldout", "train")
        ]
        table.add_row(row["what"], f"{row['learning_rate']:g}", *losses)
    Console().print(table, overlaps, report["bytes"])


def run(work: Path, base: Weights, name: str, rate: float, seed: int) -> dict[str, float]:
    """Make one run; return its mean training loss at the end and its held-out loss."""
    result: dict[str, float] = cached(
        work / f"{name} {rate:g} {seed}.pt", lambda: _run(work, base, name, rate, seed)
    )
    return result


def _run(work: Path, base: Weights, name: str, rate: float, seed: int) -> dict[str, float]:
    model = model_of(base)
    callbacks: list[TrainerCallback] = []
    if name == "found":
        callbacks.append(SubnetDiscoveryCallback(FIND, keep=KEEP))
    elif name == "gradients":
        callbacks.append(Given(scores(work, base, name, 0.0, seed)))
    elif name.startswith("SGD"):
        drift = scores(work, base, "SGD", SGD[1], seed)
        callbacks.append(Given(drift, kept=name.endswith("kept")))
    elif name != "full":
        callbacks.append(SubnetCallback(mask_of(work, base, name, seed)))
    batches: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda _, __, kw: batches.append(dict(kw)), with_kwargs=True)
    log = train(model, rate, seed, callbacks)
    if name == "full":
        torch.save(batches[:FIND], work / f"batches {seed}.pt")
        deltas = {n: w.detach() - base[n] for n, w in model.named_parameters()}
        torch.save(deltas, work / f"delta {rate:g} {seed}.pt")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return {"train": mean(losses[-LAST:]), "heldout": heldout_loss(model.eval())}


class Given(SubnetDiscoveryCallback):
    """Takes the mask from given scores in the end; its own steps move nothing that fp32 shows.

    Args:
        scores: Name of a weight -> a score of each entry.
        kept: Scores are drifts: start from where they lead.
    """

    def __init__(self, scores: Weights, kept: bool = False) -> None:
        super().__init__(FIND, keep=KEEP, learning_rate=1e-30)
        self.scores, self.kept = scores, kept

    def _decide(self, model: nn.Module) -> None:
        super()._decide(model)
        for layer in sidecar_layers(model):
            (subnet,) = layer.subnets()
            score = self.scores[layer.name]
            indices = largest_entries(score, subnet.indices.numel())
            subnet.reseat(indices, read_entries(layer.weight.data, indices))
            if self.kept:
                subnet.values.data += score.view(-1)[indices]
            layer.flush()


def train(
    model: nn.Module, rate: float, seed: int, callbacks: list[TrainerCallback]
) -> list[dict[str, float]]:
    """Train by the stock Trainer; return its log."""
    ids, labels = sums(3, STEPS * BATCH, seed=1 << 20)
    rows = [{"input_ids": i, "labels": la} for i, la in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            output_dir=directory,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.state.log_history


def mask_of(work: Path, base: Weights, name: str, seed: int) -> SubnetMask:
    """Return the seed's random or prior mask."""
    shapes = {n: tuple(w.shape) for n, w in base.items() if n.endswith("proj.weight")}
    if name == "random":
        return random(shapes, KEEP, seed)
    best = min(work.glob(f"delta * {seed}.pt"), key=_best_full(work))
    return largest(torch.load(best), shapes)


def largest(given: Weights, shapes: dict[str, tuple[int, ...]]) -> SubnetMask:
    """Return the mask of the largest scores."""
    sizes = {name: max(1, round(KEEP * given[name].numel())) for name in shapes}
    return SubnetMask({n: largest_entries(given[n], k) for n, k in sizes.items()}, shapes)


def _best_full(work: Path) -> Any:
    """Order full runs by the training loss of their learning rate at seed 0."""
    return lambda path: torch.load(work / f"full {path.stem.split()[1]} 0.pt")["train"]


def scores(work: Path, base: Weights, what: str, rate: float, seed: int) -> Weights:
    """Return how far SGD, or signSGD, moves the linear layers in the first steps, or gradients."""

    def moved() -> Weights:
        model = model_of(base)
        weights = {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
        summed = {n: torch.zeros_like(w) for n, w in weights.items()}
        for batch in torch.load(work / f"batches {seed}.pt"):
            model(**batch).loss.backward()
            with torch.no_grad():
                for name, weight in weights.items():
                    assert weight.grad is not None
                    step = weight.grad.sign() if what == "signs" else weight.grad
                    summed[name] += step
                    weight -= rate * step
            model.zero_grad()
        return summed if what == "gradients" else {n: -rate * s for n, s in summed.items()}

    result: Weights = cached(work / f"{what} scores {rate:g} {seed}.pt", moved)
    return result


def overlap(work: Path, base: Weights, what: str, rate: float, seed: int) -> float:
    """Return the share of a mask by scores that is in the prior one."""
    prior = mask_of(work, base, "prior", seed)
    found = largest(scores(work, base, what, rate, seed), dict(prior.shapes))
    return (found & prior).nnz / found.nnz


def model_of(base: Weights) -> LlamaForCausalLM:
    """Build the pretrained model."""
    model = llama()
    model.load_state_dict(base)
    return model


def stored() -> dict[str, float]:
    """Return bytes per parameter of a bf16 model in both phases."""
    model = LlamaForCausalLM(smollm2()).to(torch.bfloat16)
    numel = model.num_parameters()
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 4
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            output_dir=directory,
            max_steps=3,
            per_device_train_batch_size=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = SubnetDiscoveryCallback(2, keep=KEEP)
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
        trainer.train()
    figures = {k: v for log in trainer.state.log_history for k, v in log.items() if "bytes" in k}
    return {key.removeprefix("subnet_bytes_"): value / numel for key, value in figures.items()}


def cached(path: Path, make: Any) -> Any:
    """Return what lies in a file, made now where there is none."""
    if not path.exists():
        torch.save(make(), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return torch.load(path)


if __name__ == "__main__":
    main()
