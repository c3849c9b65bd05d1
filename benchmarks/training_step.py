"""What does a whole training step take, masked against full finetuning, phase by phase?

    python -m benchmarks.training_step

SmolLM2-135M's shapes in fp32, language modelling on 4 rows of 128 random tokens, clipping at norm 1
and AdamW: forward, backward, clip, optimizer (with the write into the weights), zero_grad. All
variants live in one process and take turns, step by step; a ratio is the median over rounds of
that round's ratio to full finetuning. The last third of the layers is masked, and beside it plainly
frozen: the other layers train nothing, and backward ends early.

Writes benchmarks/results/training_step.json and prints a table.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.optimizer import machine, smollm2
from subnet_ft import SubnetAdamW, SubnetConfig

RESULTS = Path(__file__).parent / "results" / "training_step.json"
ROUNDS, WARMUP = 15, 2
ROWS, LENGTH = 4, 128
LAST_THIRD = r"model\.layers\.2\d\..*"  # of 30 layers
PHASES = ("forward", "backward", "clip", "optimizer", "zero_grad")


class Variant:
    """A model, its optimizer and the times of its phases.

    Args:
        model: What runs.
        make: Builds the optimizer over its trainable parameters.
    """

    def __init__(
        self, model: nn.Module, make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
    ) -> None:
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make(self.trained)
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def step(self, ids: torch.Tensor) -> float:
        """Take a training step, timing each phase; return its loss."""
        loss = self._timed("forward", lambda: self.model(input_ids=ids, labels=ids).loss)
        self._timed("backward", loss.backward)
        self._timed("clip", lambda: nn.utils.clip_grad_norm_(self.trained, 1.0))
        self._timed("optimizer", self.optimizer.step)
        self._timed("zero_grad", self.optimizer.zero_grad)
        return float(loss)

    def _timed(self, phase: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        self.seconds[phase].append(time.perf_counter() - start)
        return result


def full(freeze: bool = False) -> Variant:
    """Full finetuning with torch's fused AdamW; or of the last third of the layers alone."""
    model = base()
    for i, layer in enumerate(model.model.layers if freeze else []):
        if i < 20:
            layer.requires_grad_(False)
    if freeze:
        model.model.embed_tokens.requires_grad_(False)
        model.model.norm.requires_grad_(False)
    return Variant(model, lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True))


def masked(density: float, **config: Any) -> Variant:
    """Finetuning of a random mask with SubnetAdamW."""
    model = peft.get_peft_model(base(), SubnetConfig(density=density, **config))
    return Variant(model, lambda p: SubnetAdamW(p, lr=1e-5))


def base() -> Any:
    """Random weights: what a step takes does not depend on them."""
    torch.manual_seed(0)
    return LlamaForCausalLM(smollm2())


def main() -> None:
    """Measure, write the file, print the table."""
    everything = {"include": "all"}
    variants = {
        "full": full(),
        "masked 5%": masked(0.05, **everything),
        "masked 20%": masked(0.2, **everything),
        "masked 5%, compact gradients": masked(0.05, **everything, weight_grad="compact"),
        "last third frozen out": full(freeze=True),
        "last third masked 20%": masked(0.2, include=LAST_THIRD),
    }
    generator = torch.Generator().manual_seed(0)
    for _ in track(range(ROUNDS + WARMUP), "rounds"):
        ids = torch.randint(0, 49152, (ROWS, LENGTH), generator=generator)
        for variant in variants.values():
            variant.step(ids)
    reference = totals(variants["full"])
    rows = []
    for name, variant in variants.items():
        ratios = [own / its for own, its in zip(totals(variant), reference, strict=True)]
        phases = {p: statistics.median(s[WARMUP:]) * 1e3 for p, s in variant.seconds.items()}
        rows.append(
            {
                "what": name,
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "step_ms": statistics.median(totals(variant)) * 1e3,
                "phases_ms": phases,
            }
        )
    report = {"machine": machine(), "tokens": [ROWS, LENGTH], "rounds": ROUNDS, "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("what", "ratio", "range", *(f"{phase}, ms" for phase in PHASES))
    for row in rows:
        low, high = row["ratio_range"]
        table.add_row(
            row["what"],
            f"{row['ratio']:.3f}",
            f"{low:.2f}-{high:.2f}",
            *(f"{row['phases_ms'][phase]:.1f}" for phase in PHASES),
        )
    Console().print(table)


def totals(variant: Variant) -> list[float]:
    """Seconds of each step after the warm-up."""
    return [sum(step) for step in zip(*variant.seconds.values(), strict=True)][WARMUP:]


if __name__ == "__main__":
    main()
