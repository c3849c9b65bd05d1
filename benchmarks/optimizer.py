"""What the optimizer phase takes, and what all of a model's state weighs.

    python -m benchmarks.optimizer

Time: one step with the write into the weights, against `torch.optim.AdamW(fused=True)` over all
parameters, about 100M of them in 140 tensors; interleaved, 15 rounds in each of 5 passes over all
densities, since the same dense step may take half as long again from one minute to the next. A
pass's ratio is of its medians; a row has the median of the passes, and all of them. The reference
keeps fp32 weights; ours a bf16 base. Beside it, what plain torch takes where all weights are one
tensor, by the faster of its two ways of writing: how far a machine lets any of this go.

Bytes: every storage of a bf16 model of SmolLM2-135M's shapes after a backward pass and a step:
weights, indices, values, originals, gradients, optimizer state, by walking them.

Writes benchmarks/results/optimizer.json and prints two tables.
"""

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subnet_ft import SubnetAdamW, SubnetConfig

RESULTS = Path(__file__).parent / "results" / "optimizer.json"
DENSITIES = (0.2, 0.05, 0.01)
ASKED = {0.2: 0.85, 0.05: 0.32, 0.01: 0.22}
PASSES, ROUNDS, WARMUP = 5, 15, 3
SHAPES = [(749, 576)] * 30 + [(249, 576)] * 60 + [(1998, 576)] * 40 + [(10658, 576)] * 10
SMALL = {"state_bits": 8, "master": "residual"}


def main() -> None:
    """Measure both, write the file, print the tables."""
    times, sizes = (
        over_passes([phase_times() for _ in track(range(PASSES), "passes")]),
        state_sizes(),
    )
    RESULTS.write_text(
        json.dumps({"machine": machine(), "phase": times, "bytes": sizes}, indent=2) + "\n"
    )
    console = Console()
    table = Table(
        "density", "state", "dense, ms", "ours, ms", "ratio", "range", "asked", "one tensor"
    )
    for row in times:
        table.add_row(
            f"{row['density']:.0%}",
            row["state"],
            f"{row['dense_ms']:.1f}",
            f"{row['ours_ms']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['ratios'][0]:.2f}-{row['ratios'][-1]:.2f}",
            f"{row['asked']}" if row["asked"] else "",
            f"{row['one_tensor_ratio']:.3f}" if "one_tensor_ratio" in row else "",
        )
    console.print(table)
    table = Table("what", "bytes a parameter", "formula")
    for row in sizes:
        table.add_row(row["what"], f"{row['bytes']:.3f}", row.get("formula", ""))
    console.print(table)


def phase_times() -> list[dict[str, Any]]:
    """Time steps of the dense reference and of ours in turn."""
    dense = stack(torch.float32)
    reference = torch.optim.AdamW(dense.parameters(), fused=True)
    give_gradients(dense.parameters())
    rows = []
    for density in DENSITIES:
        for state, options in (("fp32", {}), ("8-bit, residual", SMALL)):
            gc.collect()  # the model before this one is a cycle
            config = SubnetConfig(
                density=density,
                include="all",
                values_dtype="bfloat16" if options else "float32",
            )
            model = peft.get_peft_model(stack(torch.bfloat16), config)
            values = [p for p in model.parameters() if p.requires_grad]
            optimizer = SubnetAdamW(values, **options)
            give_gradients(values)
            dense_s, ours_s = interleaved(reference.step, optimizer.step)
            rows.append(
                {
                    "density": density,
                    "state": state,
                    "dense_ms": dense_s * 1e3,
                    "ours_ms": ours_s * 1e3,
                    "ratio": ours_s / dense_s,
                    "asked": None if options else ASKED[density],
                }
            )
        rows[-2]["one_tensor_ratio"] = one_tensor_ratio(reference.step, density)
    return rows


def one_tensor_ratio(dense_step: Callable[[], Any], density: float) -> float:
    """Step and write all entries of one tensor of the same size, in plain torch."""
    weight = torch.cat([p.flatten() for p in stack(torch.bfloat16).parameters()]).detach()
    nnz = round(density * weight.numel())
    indices = torch.randperm(weight.numel())[:nnz].sort().values
    values = nn.Parameter(weight[indices].float())
    give_gradients([values])
    optimizer = torch.optim.AdamW([values], fused=True)

    def step(write: Callable[[torch.Tensor], Any]) -> None:
        optimizer.step()
        write(values.detach().to(weight.dtype))

    ways = (
        lambda entries: weight.index_copy_(0, indices, entries),
        lambda entries: weight.index_put_((indices,), entries),
    )
    times = [interleaved(dense_step, partial(step, way)) for way in ways]
    return min(ours / dense for dense, ours in times)


def over_passes(passes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each row's medians over passes, and the ratio of every pass."""
    rows = []
    for same in zip(*passes, strict=True):
        medians = {
            key: statistics.median(row[key] for row in same)
            for key in ("dense_ms", "ours_ms", "ratio", "one_tensor_ratio")
            if key in same[0]
        }
        rows.append(same[0] | medians | {"ratios": sorted(row["ratio"] for row in same)})
    return rows


def stack(dtype: torch.dtype) -> nn.Module:
    """Weights alone, nothing to run."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(c, r, bias=False, dtype=dtype) for r, c in SHAPES)


def give_gradients(parameters: Any) -> None:
    """Set small random gradients."""
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3


def interleaved(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """Return the median seconds of both, called in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + WARMUP):
        for function, taken in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0][WARMUP:]), statistics.median(seconds[1][WARMUP:])


def state_sizes() -> list[dict[str, Any]]:
    """Weigh each way to train a model of SmolLM2-135M's shapes."""
    rows = []
    for density in DENSITIES:
        for label, options, per_entry in (
            ("fp32 state", {}, 18.0),
            ("8-bit, residual", SMALL, 9.2),
        ):
            config = SubnetConfig(
                density=density, include="all", values_dtype="bfloat16" if options else "float32"
            )
            asked = 2 + (8 + per_entry) * density
            rows.append(
                {
                    "what": f"subnetwork {density:.0%}, {label}",
                    "bytes": weigh(
                        torch.bfloat16, config, lambda p, o=options: SubnetAdamW(p, **o)
                    ),
                    "formula": f"2 + 8 d + {per_entry} d = {asked:.3f}",
                    "asked": asked,
                }
            )
    adamw = torch.optim.AdamW
    lora = peft.LoraConfig(r=16, target_modules="all-linear")
    rows += [
        {"what": "LoRA r=16, all linear layers", "bytes": weigh(torch.bfloat16, lora, adamw)},
        {"what": "dense AdamW, fp32 weights", "bytes": weigh(torch.float32, None, adamw)},
        {"what": "dense AdamW, all bf16", "bytes": weigh(torch.bfloat16, None, adamw)},
        *(
            {
                "what": f"dense AdamW, bitsandbytes 8-bit, {name} weights",
                "bytes": weigh(dtype, None, bitsandbytes.optim.AdamW8bit),
                # Trainer's adamw_bnb_8bit exempts embeddings: 6 bytes more an embedding's entry.
                "formula": f"2 {dtype.itemsize} + 2 = {2 * dtype.itemsize + 2}",
            }
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        ),
        {"what": "dense SGD, bf16", "bytes": weigh(torch.bfloat16, None, torch.optim.SGD)},
        {"what": "FlashOptim AdamW, as documented", "bytes": 7.0},
    ]
    return rows


def weigh(
    dtype: torch.dtype,
    config: peft.PeftConfig | None,
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
) -> float:
    """Bytes per parameter of the whole model of everything left after a step."""
    gc.collect()
    before = storage_bytes()
    model: nn.Module = LlamaForCausalLM(smollm2()).to(dtype)
    count = sum(p.numel() for p in model.parameters())
    if config is not None:
        model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trained)
    ids = torch.randint(0, 1000, (1, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    gc.collect()
    return (storage_bytes() - before) / count


def smollm2() -> LlamaConfig:
    """SmolLM2-135M's shapes."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def storage_bytes() -> int:
    """Summed bytes of every storage a live tensor holds."""
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, nn.Parameter) and not item.is_meta:
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # virtual ones share a name
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def processor() -> str:
    """Return the processor's model where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


if __name__ == "__main__":
    main()
