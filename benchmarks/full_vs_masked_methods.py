"""The methods `benchmarks/full_vs_masked.py` compares: what each trains, and with which optimizer.

A method is a row of the tables. SHiRA sizes itself by a rank r: r (in + out) entries of a layer. So
the count that all of "equal count" share is what SHiRA has at the rank nearest to 5% of the linear
layers; the mask's density, Super-Tuning's sparsity and the rank of the equal LoRA follow from it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig
from torch import nn

from subnet_ft import SubnetAdamW, SubnetConfig
from subnet_ft.plan.methods import ReleasedSGD

EQUAL, TOLERANCE = 0.05, 0.01
DENSITIES = (0.005, 0.02, EQUAL, 0.2)
SMALL = {"state_bits": 8, "master": "residual"}
# A step within backward leaves nothing to clip.
RELEASED = {"max_grad_norm": 0.0}
FLASHOPTIM_BYTES = 7.0  # a parameter, by its documentation (arXiv 2602.23349)
# How the reference is had, where an algorithm leaves a choice.
VARIED = ("full", "masked random 5%", "LoRA r=16", "SHiRA", "Super-Tuning")
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("reference precomputed", "dpo", {"precompute_ref_log_probs": True}),
    ("beta 0.04", "grpo", {"beta": 0.04}),
)


@dataclass(frozen=True)
class Counts:
    """Sizes of a model, and what the methods of equal count have in common.

    Args:
        parameters: Of the whole model, tied ones once.
        linear: Shape of every linear layer's weight but the output head's, by its name.
    """

    parameters: int
    linear: Mapping[str, tuple[int, int]]

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers."""
        return sum(rows * columns for rows, columns in self.linear.values())

    @property
    def rank(self) -> int:
        """SHiRA's r, and the rank of the LoRA of equal count."""
        sides = sum(rows + columns for rows, columns in self.linear.values())
        return max(1, round(EQUAL * self.linear_parameters / sides))

    @property
    def equal(self) -> int:
        """The count all of them have within 1%."""
        return self.rank * sum(rows + columns for rows, columns in self.linear.values())

    @property
    def density(self) -> float:
        """The same as a share of the linear layers."""
        return self.equal / self.linear_parameters

    def masked(self, density: float) -> float:
        """Return the density a mask called so really has."""
        return self.density if density == EQUAL else density


def count(model: nn.Module) -> Counts:
    """Measure a model, one on the meta device too."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return Counts(sum(p.numel() for p in model.parameters()), linear)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Setup:
    """What a method's adapter depends on besides its name."""

    counts: Counts
    seed: int = 0
    mask: Path | None = None


@dataclass(frozen=True)
class Method:
    """A row.

    Args:
        name: As the tables print it.
        group: "full", "masked" or "rival".
        rate: The middle of its learning rates, in full finetuning's.
        adapter: Makes its PEFT config; None: no adapter.
        arguments: What it changes in the trainer's arguments.
        optimizer: Class and arguments, where the trainer's own `optim` does not name it.
        prepare: What is done to the loaded model.
        modes: In which tables it stands. "fidelity": fp32 weights, under bf16 autocast where
            products in bf16 are the device's own; "memory": a bf16 base.
        keep: Of a found mask: None for all of it, else a budget of each linear layer.
        found: It needs a prior run's mask.
        equal: It has the count all of "equal count" share.
        package: What it needs installed.
        algorithms: In whose tables it stands.
    """

    name: str
    group: str
    rate: float
    adapter: Callable[[Setup], PeftConfig] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    optimizer: tuple[type, Mapping[str, Any]] | None = None
    prepare: Callable[[nn.Module], None] | None = None
    modes: tuple[str, ...] = ("fidelity", "memory")
    keep: float | None = None
    found: bool = False
    equal: bool = False
    package: str | None = None
    algorithms: tuple[str, ...] = ("sft", "dpo", "grpo")

    @property
    def learns_in(self) -> str:
        """The mode it learns in: on fp32 weights, where its values can be fp32."""
        _, options = self.optimizer or (None, {})
        return "memory" if options.get("master") == "residual" else "fidelity"

    @property
    def documented(self) -> bool:
        """Whether it cannot run here and a paper's figures stand in for it."""
        return self.package == "flashoptim" and self.optimizer is None

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return self.package is None or find_spec(self.package) is not None


def freeze_but_the_middle(model: nn.Module) -> None:
    """Let the middle third of the layers train, and nothing else."""
    numbers = {n: re.search(r"\.(\d+)\.", n) for n, _ in model.named_parameters()}
    layers = 1 + max(int(found[1]) for found in numbers.values() if found)
    middle = range(layers // 3, layers - layers // 3)
    for name, parameter in model.named_parameters():
        found = numbers[name]
        parameter.requires_grad_(found is not None and int(found[1]) in middle)


def lora(rank: int | None, dora: bool = False) -> Callable[[Setup], PeftConfig]:
    """LoRA on all linear layers; without a rank, that of equal count."""

    def make(setup: Setup) -> PeftConfig:
        r = rank or setup.counts.rank
        return LoraConfig(
            r=r,
            lora_alpha=2 * r,
            use_dora=dora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

    return make


def shira(setup: Setup) -> PeftConfig:
    """PEFT's SHiRA with its own random mask."""
    return ShiraConfig(
        r=setup.counts.rank,
        random_seed=setup.seed,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def supertuning(setup: Setup) -> PeftConfig:
    """PEFT's Super-Tuning with its own mask, the largest weights."""
    return SupertuningConfig(
        sparsity=1 - setup.counts.density, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def random_mask(density: float, **options: Any) -> Callable[[Setup], PeftConfig]:
    """A random mask of the linear layers."""
    return lambda setup: SubnetConfig(
        density=setup.counts.masked(density), seed=setup.seed, task_type="CAUSAL_LM", **options
    )


def found_mask(**options: Any) -> Callable[[Setup], PeftConfig]:
    """A prior run's mask."""
    return lambda setup: SubnetConfig(mask=setup.mask, task_type="CAUSAL_LM", **options)


def masked(name: str, adapter: Any, rate: float, options: Any = None, **more: Any) -> Method:
    """A mask trained by SubnetAdamW."""
    return Method(
        f"masked {name}", "masked", rate, adapter, optimizer=(SubnetAdamW, options or {}), **more
    )


def all_methods() -> dict[str, Method]:
    """Return every method by name, full finetuning first."""
    bf16: dict[str, Any] = {"values_dtype": "bfloat16"}
    linear, budget = "all-linear", ("memory",)
    rows = [
        Method("full", "full", 1),
        Method("full, 8-bit AdamW", "full", 1, arguments={"optim": "adamw_bnb_8bit"}),
        Method("full, released SGD", "full", 1e4, arguments=RELEASED, optimizer=(ReleasedSGD, {})),
        *(
            Method(
                f"full, {name}",
                "full",
                10,
                arguments={"optim": optim, "optim_target_modules": linear},
                modes=budget,
                package=package,
            )
            for name, optim, package in (
                ("APOLLO", "apollo_adamw", "apollo_torch"),
                ("GaLore", "galore_adamw", "galore_torch"),
            )
        ),
        flashoptim(budget),
        masked("found", found_mask(), 3, found=True),
        *(
            masked(f"found {100 * d:g}%", found_mask(), scale(d), found=True, keep=d, modes=budget)
            for d in DENSITIES
        ),
        *(
            masked(f"random {100 * d:g}%", random_mask(d), scale(d), modes=budget)
            for d in DENSITIES
            if d != EQUAL
        ),
        masked("random 5%", random_mask(EQUAL), 10, equal=True),
        masked(
            "random 5%, compact gradients",
            random_mask(EQUAL, weight_grad="compact"),
            10,
            modes=budget,
            equal=True,
        ),
        masked(
            "random 5%, released",
            random_mask(EQUAL),
            10,
            {"release_gradients": True},
            arguments=RELEASED,
            modes=budget,
            equal=True,
        ),
        masked(
            "random 5%, small state",
            random_mask(EQUAL, **bf16),
            10,
            SMALL,
            modes=budget,
            equal=True,
        ),
        masked(
            "random 5%, small state, released, compact",
            random_mask(EQUAL, weight_grad="compact", **bf16),
            10,
            SMALL | {"release_gradients": True},
            arguments=RELEASED,
            modes=budget,
            equal=True,
        ),
        masked("found, small state", found_mask(**bf16), 3, SMALL, modes=budget, found=True),
        *(Method(f"LoRA r={r}", "rival", 30, lora(r), modes=budget) for r in (1, 64)),
        Method("LoRA r=16", "rival", 30, lora(16)),
        Method("LoRA, equal count", "rival", 30, lora(None), equal=True),
        Method("DoRA r=16", "rival", 30, lora(16, dora=True), modes=budget),
        Method("SHiRA", "rival", 10, shira, equal=True),
        Method("Super-Tuning", "rival", 10, supertuning, equal=True),
        Method("middle third", "rival", 3, prepare=freeze_but_the_middle),
    ]
    for base in [row for row in rows if row.name in VARIED]:
        for what, algorithm, arguments in VARIANTS:
            options = {"algorithms": (algorithm,), "arguments": arguments}
            rows.append(replace(base, name=f"{base.name}, {what}", **options))
    return {row.name: row for row in rows}


def flashoptim(modes: tuple[str, ...]) -> Method:
    """FlashOptim's AdamW, whose kernels need a GPU."""
    optimizer = None
    if torch.cuda.is_available() and find_spec("flashoptim"):
        from flashoptim import FlashAdamW

        optimizer = (FlashAdamW, {"weight_decay": 0.0})
    return Method(
        "full, FlashOptim", "full", 1, optimizer=optimizer, modes=modes, package="flashoptim"
    )


def scale(density: float) -> float:
    """The sparser a mask, the larger its learning rate (arXiv 2405.02596)."""
    return {0.005: 30, 0.02: 10, EQUAL: 10, 0.2: 3}[density]
