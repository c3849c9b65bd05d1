"""What does a subnetwork cost on a quantized base, against QLoRA that trains as many numbers?

    python -m benchmarks.quantized

SmolLM2-135M's shapes with random weights, the base in NF4 with double quantization (computing in
bf16) or LLM.int8, everything else of it bf16. The rival is LoRA r=16 on all linear layers, in bf16
as TRL trains it on such a base and in fp32 as PEFT makes it; the mask has as many random entries of
the same layers. AdamW, language modelling on 4 rows of 128 random tokens, clipping at norm 1.

Bytes: the storages that are left after a step, by what they are; and the most that a step needs
beyond them, from torch's profiler. Time: all variants of a base live in one process and take turns;
a ratio is the median over rounds of that round's ratio to the base's QLoRA in bf16.

Writes benchmarks/results/quantized.json and prints two tables.
"""

import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from benchmarks.common import transient_bytes
from benchmarks.optimizer import machine, smollm2
from subnet_ft import SubnetAdamW, SubnetConfig

RESULTS = Path(__file__).parent / "results" / "quantized.json"
ROUNDS, WARMUP = 21, 2
ROWS, LENGTH = 4, 128
SMALL = {"state_bits": 8, "master": "residual"}
BASES = {
    "NF4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "LLM.int8": {"load_in_8bit": True},
}
KINDS = ("quantized", "scales", "other weights", "trained", "indices", "originals", "optimizer")


class Variant:
    """A model on its quantized base, and its optimizer.

    Args:
        model: What trains.
        make: Builds the optimizer over its trainable parameters.
    """

    def __init__(
        self, model: nn.Module, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make(self.trained)
        self.seconds: list[float] = []
        self.transient = 0

    @property
    def count(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.trained)

    def step(self, ids: torch.Tensor) -> None:
        """Take a training step and note its time; gradients are dropped at its end."""
        start = time.perf_counter()
        self.model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)

    def measure_transient(self, ids: torch.Tensor) -> None:
        """Note the most bytes a step holds beyond those before it."""
        self.transient = transient_bytes(lambda: self.step(ids))
        self.seconds.pop()

    def sizes(self) -> dict[str, int]:
        """Bytes of everything that stays between steps, by what it is."""
        trained = {id(p) for p in self.trained}
        parameters = list(self.model.parameters())
        packed = [p for p in parameters if type(p).__name__ in ("Params4bit", "Int8Params")]
        buffers = dict(self.model.named_buffers())
        tensors: dict[str, Iterable[Any]] = {
            "quantized": packed,
            "scales": [t for m in self.model.modules() for t in scales(m)],
            "trained": self.trained,
            "indices": [b for name, b in buffers.items() if name.endswith(".indices")],
            "originals": [b for name, b in buffers.items() if name.endswith(".originals")],
            "optimizer": [t for s in self.optimizer.state.values() for t in s.values()],
        }
        tensors["other weights"] = [
            p for p in parameters if id(p) not in trained and not any(p is q for q in packed)
        ]
        return {kind: storage_bytes(tensors[kind]) for kind in KINDS}


def scales(module: Any) -> list[torch.Tensor]:
    """Return what a quantized layer keeps beside its packed weight."""
    weight = module._parameters.get("weight")
    if type(weight).__name__ == "Int8Params":
        return [module.state.SCB if weight.SCB is None else weight.SCB]
    if type(weight).__name__ != "Params4bit":
        return []
    state = weight.quant_state
    return [state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Summed bytes of the storages of tensors, each once."""
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def variants(directory: Path, base: str) -> dict[str, Variant]:
    """Make every way of training one base."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            device_map="cpu",
            quantization_config=BitsAndBytesConfig(**BASES[base]),
        )

    def lora(dtype: torch.dtype) -> Variant:
        config = peft.LoraConfig(r=16, target_modules="all-linear")
        model = peft.get_peft_model(load(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return Variant(model, lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True))

    def masked(density: float, values_dtype: str = "float32", **options: Any) -> Variant:
        config = SubnetConfig(density=density, values_dtype=values_dtype)
        model = peft.get_peft_model(load(), config)
        return Variant(model, lambda p: SubnetAdamW(p, lr=1e-5, **options))

    made = {"QLoRA, bf16": lora(torch.bfloat16), "QLoRA, fp32": lora(torch.float32)}
    linear = sum(m.in_features * m.out_features for m in linears(made["QLoRA, bf16"].model))
    density = made["QLoRA, bf16"].count / linear
    made["masked"] = masked(density)
    if base == "NF4":
        made["masked, 8-bit state and residual"] = masked(density, "bfloat16", **SMALL)
    return made


def linears(model: nn.Module) -> list[Any]:
    """Return the quantized linear layers."""
    kinds = ("Linear4bit", "Linear8bitLt")
    return [
        m for m in model.modules() if type(m).__name__ in kinds and type(m).__module__[:4] == "bits"
    ]


def main() -> None:
    """Measure, write the file, print the tables."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        LlamaForCausalLM(smollm2()).to(torch.bfloat16).save_pretrained(directory)
        for base in BASES:
            made = variants(Path(directory), base)
            for _ in track(range(ROUNDS + WARMUP), f"{base}, rounds"):
                ids = torch.randint(0, 49152, (ROWS, LENGTH), generator=generator)
                for variant in made.values():
                    variant.step(ids)
            for variant in made.values():
                variant.measure_transient(ids)
            rows += [row(base, name, variant, made) for name, variant in made.items()]
            del made, variant
    versions = {"bitsandbytes": importlib.metadata.version("bitsandbytes")}
    report = {"machine": machine() | versions | {"threads": torch.get_num_threads()}}
    report |= {"tokens": [ROWS, LENGTH], "rounds": ROUNDS, "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    show(rows)


def row(base: str, name: str, variant: Variant, made: dict[str, Variant]) -> dict[str, Any]:
    """Return one variant's figures, and its ratios to QLoRA in bf16 on the same base."""
    rival = made["QLoRA, bf16"]
    pairs = zip(variant.seconds[WARMUP:], rival.seconds[WARMUP:], strict=True)
    ratios = [own / its for own, its in pairs]
    sizes, its = variant.sizes(), rival.sizes()
    total, rival_total = (sum(s.values()) for s in (sizes, its))
    return {
        "base": base,
        "what": name,
        "trained": variant.count,
        "step_ms": statistics.median(variant.seconds[WARMUP:]) * 1e3,
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "bytes": sizes,
        "state_bytes": total,
        "state_ratio": total / rival_total,
        "transient_bytes": variant.transient,
        "transient_ratio": variant.transient / rival.transient,
        "peak_ratio": (total + variant.transient) / (rival_total + rival.transient),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print both tables."""
    table = Table("base", "what", "trained", "step, ms", "ratio", "range")
    for r in rows:
        low, high = r["time_ratio_range"]
        table.add_row(
            r["base"],
            r["what"],
            f"{r['trained']:,}",
            f"{r['step_ms']:.0f}",
            f"{r['time_ratio']:.2f}",
            f"{low:.2f}-{high:.2f}",
        )
    Console(width=170).print(table)
    table = Table("MB", "what", *KINDS, "sum", "ratio", "step", "ratio", "peak's ratio")
    for r in rows:
        table.add_row(
            r["base"],
            r["what"],
            *(f"{r['bytes'][kind] / 1e6:.1f}" for kind in KINDS),
            f"{r['state_bytes'] / 1e6:.1f}",
            f"{r['state_ratio']:.2f}",
            f"{r['transient_bytes'] / 1e6:.0f}",
            f"{r['transient_ratio']:.2f}",
            f"{r['peak_ratio']:.2f}",
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
