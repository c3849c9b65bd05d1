"""Does small optimizer state train like fp32 state? Loss curves, and what chance alone does.

    python -m benchmarks.small_state

A Llama of 3.2M parameters learns sums of two terms from reasoning-gym's `chain_sum`, character by
character, is cast to bf16, and a random 10% of its linear layers is then finetuned on sums of
three terms for 300 steps: with fp32 state, with 8-bit moments, with bf16 values and a residual,
and with both. A seed fixes the mask and the order of the data for all of them. Beside them:

- fp32 with three other orders of the same data: what chance does. (With one of them, as this began,
  the measure of noise was a single draw.) And fp32 with the rows of every batch in another order,
  the same training on paper;
- bf16 values whose residual is thrown away at every step: a control, to see what can be told apart.

The learning rate is half of pretraining's. In 300 steps fp32 gets further at 1e-3 and 2e-3, but the
smaller an update, the more it asks of small state.

Writes benchmarks/results/small_state.json and benchmarks/figures/small_state.png. The committed run
took a quarter of an hour on two cores.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import peft
import reasoning_gym
import torch
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.optimizer import machine
from benchmarks.small_state_compare import ORDERS, ROWS, RULE, WINDOW, compare, draw, show
from subnet_ft import SubnetAdamW, SubnetConfig
from subnet_ft.adapter.inject import sidecar_layers
from subnet_kernels import small_state as small

SEEDS = (0, 1, 2)
CONTROL = "residual thrown away"
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "8-bit": {"state_bits": 8},
    "residual": {"master": "residual"},
    "8-bit, residual": {"state_bits": 8, "master": "residual"},
    **{order: {} for order in ORDERS},
    ROWS: {},
    CONTROL: {"master": "residual"},
}
BATCH, DENSITY, HELD_OUT = 32, 0.1, 512
PRETRAIN = 2  # times as many steps as finetuning has
ALPHABET = "\n0123456789+-="  # the newline ends an answer and pads
Data = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    """Train everything, write the file and the figure, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300, help="fewer, to try it out")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    start = time.perf_counter()
    with Progress() as progress:
        total = (PRETRAIN + len(SEEDS) * len(VARIANTS)) * args.steps
        task = progress.add_task("training", total=total)

        def tick() -> None:
            progress.advance(task)

        base = pretrained(PRETRAIN * args.steps, tick)
        runs = {
            variant: [finetune(base, variant, seed, args.steps, args.lr, tick) for seed in SEEDS]
            for variant in VARIANTS
        }
    summary = {
        "machine": machine() | {"threads": torch.get_num_threads()},
        "settings": {"seeds": SEEDS, "steps": args.steps, "lr": args.lr, "batch": BATCH}
        | {"density": DENSITY, "trained": len(runs["fp32"][0]["learned"]), "window": WINDOW}
        | {"pretrain_steps": PRETRAIN * args.steps, "parameters": llama().num_parameters()},
        "rule": RULE,
        "heldout_loss_before": heldout_loss(llama(base)),
        "variants": compare(runs),
        "losses": {name: [run["losses"] for run in of] for name, of in runs.items()},
        "seconds": time.perf_counter() - start,
    }
    results = args.output / "results" / "small_state.json"
    figure = args.output / "figures" / "small_state.png"
    for path in (results, figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(summary) + "\n")
    draw(summary["variants"], summary["losses"], figure)
    show(summary["variants"])


def sums(terms: int, count: int, seed: int) -> Data:
    """Return ids and labels, (count, width) each; only answers are labelled."""
    problems = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=count, min_terms=terms, max_terms=terms, max_digits=2
    )
    rows = [(p["metadata"]["expression"].replace(" ", "") + "=", p["answer"]) for p in problems]
    width = 4 * terms + 6
    ids = torch.zeros(count, width, dtype=torch.int64)
    labels = torch.full((count, width), -100)
    for i, (question, answer) in enumerate(rows):
        codes = torch.tensor([ALPHABET.index(c) for c in question + answer + "\n"])
        ids[i, : len(codes)] = codes
        labels[i, len(question) : len(codes)] = codes[len(question) :]
    return ids, labels


def llama(weights: dict[str, torch.Tensor] | None = None) -> LlamaForCausalLM:
    """Build the model, in bf16 where it is given pretrained weights."""
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if weights is not None:
        model = model.to(torch.bfloat16)
        model.load_state_dict(weights)
    return model


def pretrained(steps: int, tick: Any) -> dict[str, torch.Tensor]:
    """Train on sums of two terms, densely, in fp32; return the weights in bf16."""
    torch.manual_seed(0)
    model = llama()
    ids, labels = sums(2, steps * BATCH, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        pick = torch.randint(len(ids), (BATCH,))
        model(ids[pick], labels=labels[pick]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tick()
    return {name: w.to(torch.bfloat16) for name, w in model.state_dict().items()}


def finetune(
    base: dict[str, torch.Tensor], variant: str, seed: int, steps: int, lr: float, tick: Any
) -> dict[str, Any]:
    """Finetune the seed's mask; return losses, held-out loss and what was learned, fp32."""
    options = VARIANTS[variant]
    residual = options.get("master") == "residual"
    config = SubnetConfig(
        density=DENSITY, seed=seed, values_dtype="bfloat16" if residual else "float32"
    )
    model = peft.get_peft_model(llama(base), config)
    optimizer = SubnetAdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    ids, labels = sums(3, steps * BATCH, seed=1 << 20)
    other = 1 + ORDERS.index(variant) if variant in ORDERS else 0
    order = torch.Generator().manual_seed(seed + 100 * other)
    losses = []
    for pick in torch.randperm(len(ids), generator=order).view(steps, BATCH):
        pick = pick.flip(0) if variant == ROWS else pick
        loss = model(ids[pick], labels=labels[pick]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if variant == CONTROL:
            for state in optimizer.state.values():
                state["residual"].zero_()
        losses.append(round(loss.item(), 5))
        tick()
    subnets = [layer.subnets()[0] for layer in sidecar_layers(model)]
    values = [subnet.values.detach() for subnet in subnets]
    if residual:
        values = [
            small.join(s.values.detach(), optimizer.state[s.values]["residual"]) for s in subnets
        ]
    learned = torch.cat([v - s.originals.float() for v, s in zip(values, subnets, strict=True)])
    return {"losses": losses, "heldout": heldout_loss(model), "learned": learned}


@torch.no_grad()
def heldout_loss(model: torch.nn.Module) -> float:
    """Mean loss of an answer's character over problems no run has seen."""
    ids, labels = sums(3, HELD_OUT, seed=1 << 24)
    loss: torch.Tensor = model(ids, labels=labels).loss
    return loss.item()


if __name__ == "__main__":
    main()
