"""The learning meter: how much of the gradient a subnetwork sees, and whether its values move.

A subnetwork at a full run's learning rate can train for hours without one weight changing as a bf16
model shows it. Loss curves are slow to tell.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments

from subnet_ft.adapter.clip import squared_norm
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.adapter.subnet import Subnet
from subnet_ft.errors import ConfigError

logger = logging.getLogger(__name__)

# Nothing moves if less than this share has after as many steps; entries at zero always do.
MOVED, PATIENCE = 0.01, 10


class SubnetMeter:
    """Measures a step of the live subnetwork: `start` before its forward pass, `stop` after it.

    While it runs, backward takes the norms of every masked parameter's gradient, and the values'
    bf16 bits of before are kept, 2 bytes each. Between measurements it costs nothing.

    Args:
        model: With an adapter of ours, as a PeftModel or injected.

    Raises:
        ConfigError: The model has no subnetwork that trains.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = list(sidecar_layers(model))
        self._subnets = [s for la in layers for s in la.subnets() if s.values.requires_grad]
        if not self._subnets:
            raise ConfigError(
                "learning meter: expected a model with a subnetwork that trains, found none; use "
                "peft_config=SubnetConfig(...) or SubnetCallback"
            )
        self.sees_gradients = not any(layer.computes_weight_grad for layer in layers)
        self.running = False
        self._before: list[torch.Tensor] = []
        self._squares: list[tuple[torch.Tensor, torch.Tensor]] = []

    def start(self) -> None:
        """Begin a measurement."""
        self.running = True
        self._squares = []
        self._before = [_visible(subnet, subnet.values) for subnet in self._subnets]
        if self.sees_gradients:
            for subnet in self._subnets:
                subnet.observer = self._observe

    def stop(self) -> dict[str, float]:
        """End the measurement.

        Returns:
            ``subnet_grad_share``: share of the gradient's squared norm, over the masked parameters,
            that is inside the mask; summed over micro-batches and over the uses of a parameter.
            Absent where a layer has no dense gradient (``weight_grad="compact"`` or ``"auto"``, a
            quantized base).
            ``subnet_flipped``: how many values this step changed in bf16 (fp16 on an fp16 base).
            ``subnet_flipped_so_far``: how many differ there from the base's.
            ``subnet_never_moved``: the share that does not; one that has returned counts as well.
        """
        after = [_visible(subnet, subnet.values) for subnet in self._subnets]
        base = [_visible(subnet, subnet.originals) for subnet in self._subnets]
        flipped, so_far = (_count_differences(after, other) for other in (self._before, base))
        numel = sum(subnet.indices.numel() for subnet in self._subnets)
        measured: dict[str, float] = {}
        if self._squares:
            whole, inside = (
                torch.stack(part).sum().item() for part in zip(*self._squares, strict=True)
            )
            if whole and math.isfinite(whole):  # a GradScaler may be trying too large a scale
                measured["subnet_grad_share"] = inside / whole
        for subnet in self._subnets:
            subnet.observer = None
        self.running = False
        self._before = []
        return measured | {
            "subnet_flipped": flipped,
            "subnet_flipped_so_far": so_far,
            "subnet_never_moved": 1 - so_far / numel,
        }

    def _observe(self, gradient: torch.Tensor, compact: torch.Tensor) -> None:
        self._squares.append((squared_norm(gradient), squared_norm(compact)))


class SubnetMeterCallback(TrainerCallback):
    """Puts the learning meter's figures into a Trainer's logs; `SubnetCallback` does so by itself.

    The steps that are logged are measured, and no others (all of them with
    ``logging_strategy="epoch"``); `SubnetMeter.stop` names the figures. One warning is given where
    next to nothing moves. A Trainer runs the trackers of ``report_to`` before the callbacks it is
    passed; they see the figures if this one stands first:
    ``trainer.callback_handler.callbacks.insert(0, SubnetMeterCallback())``.

    Example:
        >>> trainer = SFTTrainer(  # doctest: +SKIP
        ...     model, peft_config=SubnetConfig(mask="mask.safetensors"),
        ...     callbacks=[SubnetMeterCallback()])
    """

    def __init__(self) -> None:
        self._meter: SubnetMeter | None = None
        self._measured: dict[str, float] = {}
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the subnetwork.

        Raises:
            ConfigError: There is none that trains.
        """
        self._meter = SubnetMeter(kwargs["model"])
        if not self._meter.sees_gradients and args.logging_strategy != IntervalStrategy.NO:
            logger.warning(
                'subnet_grad_share is not logged: with weight_grad="compact" or "auto", and on a '
                "quantized base, there is no dense gradient to compare with"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the meter if this step will be logged."""
        if self._meter is not None and _will_log(args, state):
            self._meter.start()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the meter, and warn if nothing moves."""
        if self._meter is None or not self._meter.running:
            return
        self._measured = self._meter.stop()
        moved = 1 - self._measured["subnet_never_moved"]
        steps = state.global_step + 1
        if steps >= PATIENCE and moved < MOVED and not self._warned:
            self._warned = True
            logger.warning(
                "after %d steps %.2g%% of the subnetwork's values have moved in bf16, at a rate of "
                "%.3g: a learning rate carried over from a full run is often too small; try a "
                "larger one",
                steps,
                100 * moved,
                max(kwargs["lr_scheduler"].get_last_lr()),
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the figures of the step that is logged."""
        add_to_logs(state, kwargs.get("logs"), self._measured)
        self._measured = {}


def add_to_logs(
    state: TrainerState, logs: dict[str, float] | None, more: Mapping[str, float]
) -> None:
    """Add figures to what a Trainer is logging now, and to its history.

    Args:
        state: The Trainer's.
        logs: As `on_log` gets them.
        more: What to add.
    """
    for target in (logs, state.log_history[-1] if state.log_history else None):
        if target is not None:
            target.update(more)


def _will_log(args: TrainingArguments, state: TrainerState) -> bool:
    step = state.global_step + 1
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
    return args.logging_strategy != IntervalStrategy.NO


def _visible(subnet: Subnet, values: torch.Tensor) -> torch.Tensor:
    """Return a copy as the model shows them: in bf16, as extraction compares."""
    half = subnet.originals.dtype == torch.float16
    return values.detach().to(torch.float16 if half else torch.bfloat16, copy=True)


def _count_differences(a: list[torch.Tensor], b: list[torch.Tensor]) -> int:
    counts = [(x != y).sum() for x, y in zip(a, b, strict=True)]
    return int(torch.stack(counts).sum())
