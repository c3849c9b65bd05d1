"""Ways to train, each the code its users run: what it does to a model, and its optimizer."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import peft
import torch
from torch import nn
from torch._guards import active_fake_mode

from subnet_ft.adapter import SubnetConfig
from subnet_ft.adapter.targets import target_shapes
from subnet_ft.errors import ConfigError
from subnet_ft.mask import SubnetMask
from subnet_ft.optim import SubnetAdamW
from subnet_ft.selectors import SELECTORS

STATES = ("fp32", "8bit")
EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")  # fused, 3-D, no linear layers


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        kind: ``"masked"``, ``"lora"``, ``"full"`` or ``"sgd"``.
        density: Masked: share of each linear layer, and of fused experts.
        state: Masked: ``"fp32"``, or ``"8bit"`` with bf16 values and a residual.
        rank: LoRA's, on the same layers.
        weights: Full: dtype of the weights; fp32 trains under autocast.
        released: Step each parameter within backward and drop its gradient: always with SGD.
        weight_grad: Masked: as in `SubnetConfig`.

    Raises:
        ConfigError: A density outside (0, 1], or a state not listed.
    """

    kind: str
    density: float = 0.0
    state: str = "fp32"
    rank: int = 0
    weights: torch.dtype = torch.bfloat16
    released: bool = False
    weight_grad: str = "dense"

    def __post_init__(self) -> None:
        if self.kind == "masked" and not 0 < self.density <= 1:
            raise ConfigError(f"density: expected a share in (0, 1], found {self.density}")
        if self.state not in STATES:
            raise ConfigError(f"state: expected one of {STATES}, found {self.state!r}")

    @property
    def adapts(self) -> bool:
        """Whether it is a PEFT adapter, whose base serves as its reference."""
        return self.kind in ("masked", "lora")

    @property
    def clips(self) -> bool:
        """Whether gradients are left to be clipped when backward ends."""
        return not (self.released or self.kind == "sgd")

    @property
    def name(self) -> str:
        """What it is called in tables."""
        if self.kind == "full":
            return f"full, AdamW, {'all bf16' if self.weights == torch.bfloat16 else 'fp32 master'}"
        if self.kind == "sgd":
            return "full, SGD, released gradients"
        if self.kind == "lora":
            return f"LoRA r={self.rank}"
        options = [f"{self.state} state"] if self.state == "fp32" else ["8-bit state, residual"]
        options += ["released gradients"] if self.released else []
        options += [f"weight_grad={self.weight_grad}"] if self.weight_grad != "dense" else []
        return f"masked {self.density:.3g}, " + ", ".join(options)

    def at(self, density: float) -> "Method":
        """Return the same with another density."""
        return replace(self, density=density)

    def attach(self, model: nn.Module) -> nn.Module:
        """Make a base model what this method trains."""
        if self.kind == "lora":
            experts = [n for n, _ in model.named_parameters() if EXPERTS.fullmatch(n)]
            return peft.get_peft_model(
                model,
                peft.LoraConfig(
                    r=self.rank,
                    lora_alpha=self.rank,
                    target_modules="all-linear",
                    target_parameters=experts or None,
                ),
            )
        if self.kind == "masked":
            config = SubnetConfig(
                mask=mask_of(model, self.density),
                values_dtype="float32" if self.state == "fp32" else "bfloat16",
                weight_grad=self.weight_grad,
            )
            return peft.get_peft_model(model, config)
        return model

    def optimizer(self, trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Make its optimizer."""
        if self.kind == "masked":
            small: dict[str, Any] = {"state_bits": 8, "master": "residual"}
            options = {} if self.state == "fp32" else small
            return SubnetAdamW(trained, release_gradients=self.released, **options)
        if self.kind == "sgd":
            return ReleasedSGD(trained, lr=1e-5)
        return torch.optim.AdamW(trained, fused=True)


class ReleasedSGD(torch.optim.SGD):
    """SGD that steps each parameter within backward and drops its gradient at once.

    `step` then finds no gradient, and has nothing left to do.

    Args:
        params: Parameters; one learning rate serves all.
        lr: Learning rate.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._step_now)

    @torch.no_grad()
    def _step_now(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])
        parameter.grad = None


class TracedIndices(Mapping[str, torch.Tensor]):
    """Indices of a FakeTensorMode, made when asked for: a shape and no memory.

    Args:
        counts: Parameter name -> how many.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = counts

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.empty(self.counts[name], dtype=torch.int32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


def mask_of(model: nn.Module, density: float) -> SubnetMask:
    """Make a mask of the same share of every linear layer and all fused experts.

    Random, as without a prior run; under a FakeTensorMode of shapes alone.
    """
    shapes = target_shapes(model, "all-linear", None)
    shapes |= {n: tuple(p.shape) for n, p in model.named_parameters() if EXPERTS.fullmatch(n)}
    if active_fake_mode() is None:
        return SELECTORS["random"](shapes, density, 0)
    counts = {n: min(prod(s), max(1, round(density * prod(s)))) for n, s in shapes.items()}
    return SubnetMask.from_source(
        TracedIndices(counts), counts, shapes, checksums={}, metadata={}, changed={}
    )
