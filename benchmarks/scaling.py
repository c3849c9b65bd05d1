"""How does cost grow with model size, density and sequence length, masked beside full?

    python -m benchmarks.scaling

Llamas of random weights in bf16, language modelling on random tokens, clipping at norm 1. Full:
torch's fused AdamW, all in bf16: the cheapest dense AdamW there is, which drops small updates; with
fp32 weights its state is 16 bytes a parameter, not 8. Masked: a random mask of every parameter with
fp32 values, SubnetAdamW. Both live in one process and take turns; a ratio is the median over rounds
of that round's ratio. Where the free memory does not hold both, one runs after the other; where it
does not hold full, masked runs alone. The row says which.

Three sweeps: five models at 5%; seven densities of SmolLM2-135M's shapes; five lengths of one row
of it. What to expect, with N parameters, density d, and tokens T in rows of length L:

    state, masked      N (2 + 26 d): bf16 weights; an entry has its index (8, on a CPU), value (4),
                       original (2), gradient (4) and moments (8)
    state, full        N (2 + 2 + 4) = 8 N: weights, gradients, moments
    adapter file       N (min(4 d, 0.125) + 4 d): int32 indices or a bitmap, fp32 values
    sync, first        N (min(4 d, 0.125) + 2 d): the same indices, bf16 values
    sync, later        2 d N: the mask is fixed. Of the whole model: 2 N
    forward, backward  6 N T + 12 layers hidden L T operations: linear in N, and in L up to the
                       attention's square. The operations' own fitted exponent stands beside
    optimizer          linear in N and in d, no function of T. In d a constant remains: a call
                       costs something for each tensor
    extraction         linear in bytes; in d a constant for reading, a part for what changed
    transient          linear in T once activations outweigh the gradients a step holds

State is measured by walking all storages after a backward pass, transient memory by torch's
profiler, file bytes on disk, sync bytes from what the file holds.

Writes benchmarks/results/scaling.json and prints tables.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import transient_bytes
from benchmarks.extract import weight_bytes, write_pair
from benchmarks.optimizer import machine, smollm2, storage_bytes
from benchmarks.scaling_laws import FULL_STATE, laws, masked_state, show
from benchmarks.training_step import WARMUP, Variant, totals
from subnet_ft import SubnetAdamW, SubnetConfig, extract_mask

RESULTS = Path(__file__).parent / "results" / "scaling.json"
ROUNDS, REPEATS = 3, 3
ROOM = 0.85  # of the free memory
ACTIVATIONS = 2e9  # bytes kept free for them


def llama(
    hidden: int, inner: int, layers: int, heads: int, vocabulary: int, kv: int = 0
) -> LlamaConfig:
    """Return a Llama's config, its embeddings tied."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv or heads,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Settings:
    """What is swept over.

    Attributes:
        models: Of the size sweep, by name.
        middle: The one whose density and length are swept.
        density: Where it is not swept.
        densities: Of the density sweep.
        tokens: Rows and their length where it is not swept.
        lengths: Of the length sweep, one row each.
    """

    models: dict[str, LlamaConfig]
    middle: str = "135M"
    density: float = 0.05
    densities: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    tokens: tuple[int, int] = (4, 128)
    lengths: Sequence[int] = (128, 256, 512, 1024, 2048)


SETTINGS = Settings(
    {
        "10M": llama(256, 704, 10, 4, 8192),
        "30M": llama(384, 1024, 14, 6, 16384),
        "135M": smollm2(),
        "360M": llama(960, 2560, 32, 15, 49152, kv=5),
        "1.7B": llama(2048, 8192, 24, 32, 49152),
    }
)
QUICK = Settings(
    {name: SETTINGS.models[name] for name in ("10M", "30M")},
    middle="10M",
    densities=(0.01, 0.1, 1.0),
    tokens=(2, 64),
    lengths=(64, 128, 256),
)


def full(config: LlamaConfig) -> Variant:
    """Full finetuning, all in bf16."""
    return Variant(base(config), lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True))


def masked(config: LlamaConfig, density: float) -> Variant:
    """Finetuning of a random mask of every parameter."""
    model = peft.get_peft_model(base(config), SubnetConfig(density=density, include="all"))
    return Variant(model, lambda p: SubnetAdamW(p, lr=1e-5))


def base(config: LlamaConfig) -> Any:
    """Random weights: no cost depends on them."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def parameters(config: LlamaConfig) -> int:
    """Return a model's count of parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def operations(config: LlamaConfig, rows: int, length: int) -> float:
    """Return the floating-point operations of a forward and a backward pass."""
    attention = 12 * config.num_hidden_layers * config.hidden_size * length
    return rows * length * (6.0 * parameters(config) + attention)


def draw(config: LlamaConfig, rows: int, length: int) -> torch.Tensor:
    """Draw random tokens."""
    return torch.randint(0, config.vocab_size, (rows, length))


Made = tuple[Variant, dict[str, int]]


def weighed(make: Callable[[], Variant], ids: torch.Tensor) -> Made:
    """Make a variant, take its first steps, and measure its memory.

    Returns:
        The variant, after as many steps as `benchmarks.training_step` takes for warm-up; and
        `state_bytes`, `gradient_bytes`, `transient_bytes` and `peak_bytes`.
    """
    gc.collect()
    before = storage_bytes()
    variant = make()
    variant.step(ids)
    variant.model(input_ids=ids, labels=ids).loss.backward()
    # Before the walk, which sees only tensors that Python has touched.
    gradients = sum(p.grad.nbytes for p in variant.trained if p.grad is not None)
    gc.collect()
    state = storage_bytes() - before
    variant.optimizer.zero_grad()
    transient = transient_bytes(lambda: variant.step(ids))
    assert len(variant.seconds["forward"]) == WARMUP
    return variant, {
        "state_bytes": state,
        "gradient_bytes": gradients,
        "transient_bytes": transient,
        "peak_bytes": state - gradients + transient,
    }


def in_turn(
    makers: Mapping[Any, Callable[[], Variant]],
    tokens: Callable[[], torch.Tensor],
    tell: Callable[[], Any],
) -> dict[Any, Made]:
    """Make variants, and step them in turn, round by round."""
    made = {name: weighed(make, tokens()) for name, make in makers.items()}
    for _ in range(ROUNDS):
        ids = tokens()
        for variant, _ in made.values():
            variant.step(ids)
        tell()
    return made


def side(made: Made, reference: list[float] | None) -> dict[str, Any]:
    """Return a variant's memory and times, and its ratio to full finetuning's steps."""
    variant, memory = made
    steps = totals(variant)
    row: dict[str, Any] = {
        **memory,
        "step_ms": statistics.median(steps) * 1e3,
        "phases_ms": {p: statistics.median(s[WARMUP:]) * 1e3 for p, s in variant.seconds.items()},
        "ratio": None,
        "ratio_range": None,
    }
    if reference is not None:
        ratios = [own / its for own, its in zip(steps, reference, strict=True)]
        row |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    return row


def moved(variant: Variant) -> dict[str, int]:
    """Return the entries of a masked variant, and what saving and syncing them moves."""
    with tempfile.TemporaryDirectory() as place:
        variant.model.save_pretrained(place)
        path = Path(place, "adapter_model.safetensors")
        size, tensors = path.stat().st_size, load_file(path)
    packed = (t for key, t in tensors.items() if key.endswith((".indices", ".bitmap")))
    trained = sum(p.numel() for p in variant.trained)
    values = trained * torch.bfloat16.itemsize
    return {
        "trained": trained,
        "file_bytes": size,
        "sync_bytes": sum(t.nbytes for t in packed) + values,
        "sync_values_bytes": values,
    }


def extraction(config: LlamaConfig, changed: float) -> dict[str, Any]:
    """Time extraction of a pair in bf16, its files in the page cache, imports not counted."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pair(folder, config, changed)
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            extract_mask(
                folder / "base",
                folder / "tuned",
                output=folder / "mask.safetensors",
                overwrite=True,
                progress=False,
            )
            seconds.append(time.perf_counter() - start)
        return {
            "bytes_a_side": weight_bytes(folder / "base"),
            "changed": changed,
            "seconds": statistics.median(seconds),
        }


def groups(count: int, density: float) -> list[list[str]]:
    """Return what the free memory lets live in one process at once."""
    free = psutil.virtual_memory().available * ROOM - ACTIVATIONS
    dense, ours = count * FULL_STATE, count * masked_state(density)
    if dense + ours <= free:
        return [["full", "masked"]]
    return [["full"], ["masked"]] if dense <= free else [["masked"]]


def size_sweep(settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """Measure every model at one density."""
    rows = []
    task = progress.add_task("size", total=len(settings.models))
    for name, config in settings.models.items():
        progress.update(task, description=f"size: {name}")
        count = parameters(config)
        makers = {
            "full": partial(full, config),
            "masked": partial(masked, config, settings.density),
        }
        together = groups(count, settings.density)
        row: dict[str, Any] = {
            "model": name,
            "parameters": count,
            "operations": operations(config, *settings.tokens),
            "in_turn": len(together[0]) == 2,
            "full": None,
        }
        reference = None
        for group in together:
            made = in_turn(
                {kind: makers[kind] for kind in group},
                partial(draw, config, *settings.tokens),
                lambda: progress.advance(task, 0.8 / ROUNDS / len(together)),  # noqa: B023
            )
            if "full" in made:
                reference = totals(made["full"][0])
            row |= {kind: side(one, reference) for kind, one in made.items()}
            if "masked" in made:
                row["masked"] |= moved(made["masked"][0])
            del made
            gc.collect()
        row["extraction"] = extraction(config, settings.density)
        progress.advance(task, 0.2)
        rows.append(row)
    return rows


def density_sweep(settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """Measure every density of one model, all in one process."""
    config = settings.models[settings.middle]
    task = progress.add_task("density", total=ROUNDS + len(settings.densities))
    made = in_turn(
        {"full": partial(full, config)}
        | {density: partial(masked, config, density) for density in settings.densities},
        partial(draw, config, *settings.tokens),
        lambda: progress.advance(task),
    )
    reference = totals(made["full"][0])
    shared = {
        "model": settings.middle,
        "parameters": parameters(config),
        "full": side(made.pop("full"), reference),
    }
    rows = [
        shared | {"density": density, "masked": side(one, reference) | moved(one[0])}
        for density, one in made.items()
    ]
    del made
    gc.collect()
    for row in rows:
        row["extraction"] = extraction(config, row["density"])
        progress.advance(task)
    return rows


def length_sweep(settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """Measure every length of one row."""
    config = settings.models[settings.middle]
    rows = []
    task = progress.add_task("length", total=len(settings.lengths) * ROUNDS)
    for length in settings.lengths:
        made = in_turn(
            {"full": partial(full, config), "masked": partial(masked, config, settings.density)},
            partial(draw, config, 1, length),
            lambda: progress.advance(task),
        )
        reference = totals(made["full"][0])
        row = {
            "model": settings.middle,
            "parameters": parameters(config),
            "length": length,
            "operations": operations(config, 1, length),
        }
        rows.append(row | {kind: side(one, reference) for kind, one in made.items()})
        del made
    return rows


def measure(settings: Settings) -> dict[str, Any]:
    """Run the sweeps and fit their laws."""
    results: dict[str, Any] = {
        "machine": machine() | {"threads": torch.get_num_threads()},
        "tokens": list(settings.tokens),
        "dtype": "bfloat16",
        "density_elsewhere": settings.density,
        "rounds": ROUNDS,
    }
    with Progress() as progress:
        results["density"] = density_sweep(settings, progress)
        results["length"] = length_sweep(settings, progress)
        results["size"] = size_sweep(settings, progress)
    return results | {"fits": laws(results)}


def main() -> None:
    """Measure, write the file, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the two smallest models, seconds")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = measure(QUICK if arguments.quick else SETTINGS)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
