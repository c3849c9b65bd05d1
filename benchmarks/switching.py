"""What do switching adapters, generating and running forward take, beside LoRA and the bare model?

    python -m benchmarks.switching [MEASURE ...]

SmolLM2-135M's shapes with random weights, in fp32 and bf16. Ours: two adapters of 5% of the linear
layers. LoRA: two of rank 16 on the same layers. The bare model has the weights of ours with the
adapter live. All live in one process and take turns in random order; a ratio is the median over
rounds of that round's ratio, with its range beside it.

Switching: `set_adapter` to the other one and `disable_adapter` there and back, against LoRA's
`merge_adapter` and `unmerge_adapter`, and against the same verbs of unmerged LoRA, which only set
flags and pay in every forward pass. What either leaves of the weights is compared as integers.
Reference: a pass of 512 tokens with the adapter off, and back on; beside it the same with the
weights written both ways, as they are when somebody looks at them in between.
Forward: 512 tokens, without gradients and with. Generation: greedy, with a cache. Beside the bare
model stands the same with frozen weights, as those under adapters are: of a prompt's last position
torch makes a slower product (bmm, not mm) unless the head's weight requires gradients.

Writes benchmarks/results/switching.json and prints a table. With names of measures only those are
taken, and the file's others kept.
"""

import copy
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.optimizer import machine, smollm2
from subnet_ft import SubnetConfig
from subnet_ft.adapter.inject import sidecar_layers

RESULTS = Path(__file__).parent / "results" / "switching.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSITY, RANK = 0.05, 16
PROMPT, GENERATED, FORWARD = 32, 64, 512
SWITCHES, GENERATIONS, PAIRS, WARMUP = 20, 10, 20, 2

Seconds = dict[str, list[float]]
Measure = Callable[[peft.PeftModel, peft.PeftModel], tuple[Seconds, dict[str, Any]]]


def main() -> None:
    """Measure, write the file, print the table."""
    # Others' work on the same machine moves all contenders' times, and their ratios less.
    state = machine() | {"threads": torch.get_num_threads(), "load before": os.getloadavg()[0]}
    measures: dict[str, tuple[Measure, str]] = {
        "switching": (switching, "LoRA: merge, unmerge"),
        "reference": (reference, "bare"),
        "generation": (generation, "bare"),
        "forward": (forward, "bare, no gradients"),
    }
    wanted = sys.argv[1:] or list(measures)
    report: dict[str, Any] = {"machine": state, "rows": [], "facts": {}}
    if sys.argv[1:]:
        kept = json.loads(RESULTS.read_text())
        report["rows"] = [row for row in kept["rows"] if row["what"] not in wanted]
        report["facts"] = {
            name: found for name, found in kept["facts"].items() if name.split(",")[0] not in wanted
        }
    with Progress() as progress:
        task = progress.add_task("measuring", total=len(wanted) * len(DTYPES))
        for name, dtype in DTYPES.items():
            ours, lora = masked(dtype), low_rank(dtype)
            for what in wanted:
                measure, to = measures[what]
                seconds, found = measure(ours, lora)
                report["rows"] += summary(what, name, seconds, to)
                report["facts"][f"{what}, {name}"] = found
                progress.advance(task)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("what", "weights", "who", "ms", "ratio", "range", "to")
    for row in report["rows"]:
        low, high = row["ratio_range"]
        table.add_row(
            row["what"],
            row["weights"],
            row["who"],
            f"{row['ms']:.1f}",
            f"{row['ratio']:.3f}",
            f"{low:.2f}-{high:.2f}",
            row["to"],
        )
    Console().print(table, report["facts"])


def base(dtype: torch.dtype) -> LlamaForCausalLM:
    """Random weights: no time here depends on them."""
    torch.manual_seed(0)
    return LlamaForCausalLM(smollm2()).to(dtype).eval()


def masked(dtype: torch.dtype) -> peft.PeftModel:
    """Two subnetworks, each away from the base."""
    model = peft.get_peft_model(base(dtype), SubnetConfig(density=DENSITY), "first")
    model.add_adapter("second", SubnetConfig(density=DENSITY, seed=1))
    for layer in sidecar_layers(model):
        for subnet in layer.subnets(("first", "second")):
            subnet.values.data.mul_(1.1)
    model.set_adapter("second")
    model.set_adapter("first")
    return model


def low_rank(dtype: torch.dtype) -> peft.PeftModel:
    """Two LoRA adapters, each away from the base."""
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base(dtype), config, "first")
    model.add_adapter("second", config)
    model.set_adapter("first")
    return model


def switching(ours: peft.PeftModel, lora: peft.PeftModel) -> tuple[Seconds, dict[str, Any]]:
    """Time verbs; say how many weights are other bits afterwards."""

    def merge() -> None:
        lora.merge_adapter()
        lora.unmerge_adapter()

    def disable(model: peft.PeftModel) -> None:
        with model.disable_adapter():
            pass

    before = [copy.deepcopy(linear_weights(model)) for model in (ours, lora)]
    seconds = in_turn(
        {
            "LoRA: merge, unmerge": merge,
            "ours: set_adapter": lambda: other(ours),
            "LoRA: set_adapter": lambda: other(lora),
            "ours: disable_adapter": lambda: disable(ours),
            "LoRA: disable_adapter": lambda: disable(lora),
        },
        SWITCHES,
    )
    for model in (ours, lora):
        model.set_adapter("first")
    changed = [
        sum(int((a != b).sum()) for a, b in zip(old, linear_weights(model), strict=True))
        / sum(a.numel() for a in old)
        for old, model in zip(before, (ours, lora), strict=True)
    ]
    entries = sum(layer.subnet("first").indices.numel() for layer in sidecar_layers(ours))
    return seconds, {
        "entries of an adapter": entries,
        "share of weights changed after all rounds, ours": changed[0],
        "share of weights changed after all rounds, LoRA": changed[1],
    }


def reference(ours: peft.PeftModel, lora: peft.PeftModel) -> tuple[Seconds, dict[str, Any]]:
    """Time a pass with the adapter off; check that its logits are the base's, bit for bit."""
    bare, inputs, logits = base(ours.dtype), ids(FORWARD), {}

    def run(name: str, model: nn.Module, off: Any, write: bool = False) -> None:
        with torch.no_grad(), off:
            if write:
                for layer in sidecar_layers(model):
                    layer.settle()
            logits[name] = model(input_ids=inputs).logits

    seconds = in_turn(
        {
            "bare": lambda: run("bare", bare, nullcontext()),
            "ours": lambda: run("ours", ours, ours.disable_adapter()),
            "ours, written": lambda: run("written", ours, ours.disable_adapter(), write=True),
            "LoRA": lambda: run("LoRA", lora, lora.disable_adapter()),
        },
        PAIRS,
    )
    same = all(torch.equal(logits["bare"], logits[name]) for name in ("ours", "written"))
    return seconds, {"logits equal the base's": same}


def generation(ours: peft.PeftModel, lora: peft.PeftModel) -> tuple[Seconds, dict[str, Any]]:
    """Time greedy generation of a few tokens; check that ours are the bare model's."""
    prompt = ids(PROMPT)
    merged = low_rank(lora.dtype).merge_and_unload()
    models = contenders(ours, lora) | {"LoRA, merged": merged}
    texts: dict[str, torch.Tensor] = {}

    def run(name: str) -> None:
        texts[name] = models[name].generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=GENERATED,
            max_new_tokens=GENERATED,
            pad_token_id=0,
        )

    seconds = in_turn({name: lambda n=name: run(n) for name in models}, GENERATIONS)
    speed = {name: GENERATED / statistics.median(taken) for name, taken in seconds.items()}
    same = torch.equal(texts["bare"], texts["ours"])
    return seconds, {"tokens a second": speed, "tokens equal the bare model's": same}


def forward(ours: peft.PeftModel, lora: peft.PeftModel) -> tuple[Seconds, dict[str, Any]]:
    """Time a forward pass in pairs; check that logits are the bare model's, bit for bit."""
    models = contenders(ours, lora)
    inputs, logits = ids(FORWARD), {}

    def run(name: str, gradients: bool) -> None:
        with torch.set_grad_enabled(gradients):
            logits[name, gradients] = models[name](input_ids=inputs).logits.detach()

    seconds = {}
    for gradients, label in ((False, "no gradients"), (True, "gradients")):
        names = [name for name in models if not (gradients and name == "bare, frozen")]
        seconds |= in_turn(
            {f"{name}, {label}": lambda n=name, g=gradients: run(n, g) for name in names}, PAIRS
        )
    same = all(torch.equal(logits["bare", g], logits["ours", g]) for g in (False, True))
    return seconds, {"logits equal the bare model's": same}


def contenders(ours: peft.PeftModel, lora: peft.PeftModel) -> dict[str, nn.Module]:
    """Both, and two models without adapters that have the weights of ours, one of them frozen."""
    weights = copy.deepcopy(ours).merge_and_unload().state_dict()
    bare = [base(ours.dtype) for _ in range(2)]
    for model in bare:
        model.load_state_dict(weights)
    return {
        "bare": bare[0],
        "bare, frozen": bare[1].requires_grad_(False),
        "ours": ours,
        "LoRA": lora,
    }


def other(model: peft.PeftModel) -> None:
    """Switch between the two adapters."""
    model.set_adapter("second" if model.active_adapter == "first" else "first")


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """The base's matrices, as integers."""
    integer = {2: torch.int16, 4: torch.int32}
    return [
        p.data.view(integer[p.element_size()])
        for name, p in model.named_parameters()
        if "_proj." in name and "lora_" not in name and "subnet_ft_" not in name
    ]


def ids(length: int) -> torch.Tensor:
    """One row of random tokens."""
    return torch.randint(3, 49152, (1, length), generator=torch.Generator().manual_seed(0))


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Call each once a round, in any order; return what each took, without the first rounds."""
    seconds: Seconds = {name: [] for name in functions}
    shuffle = random.Random(0).shuffle  # whoever ran before leaves its own weights in the caches
    order = list(functions)
    for _ in range(WARMUP + rounds):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[WARMUP:] for name, taken in seconds.items()}


def summary(what: str, weights: str, seconds: Seconds, reference: str) -> list[dict[str, Any]]:
    """Return medians, and ratios to the reference within each round."""
    rows = []
    for who, taken in seconds.items():
        to = reference.replace("no gradients", "gradients") if ", gradients" in who else reference
        ratios = [own / its for own, its in zip(taken, seconds[to], strict=True)]
        rows.append(
            {
                "what": what,
                "weights": weights,
                "who": who,
                "ms": statistics.median(taken) * 1e3,
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "to": to,
            }
        )
    return rows


if __name__ == "__main__":
    main()
