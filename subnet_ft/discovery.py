"""SubnetDiscoveryCallback: the first steps of a run find the mask that the rest of it trains.

For a machine too small for full finetuning. While the mask is looked for, signSGD moves every
targeted weight. As backward completes a gradient its signs are counted and it is dropped: one dense
gradient exists at a time, and no optimizer state. What is kept beside the weights is the base and
one byte an entry. Those that moved furthest become the mask; they go on from where they are, and
everything else returns to the base.

Why signs: plain SGD, and sums of gradients, concentrate in the rows and columns where gradients
are large, and AdamW does not. ``benchmarks/discovery.py`` compares what the rest of a run makes of
each.

The adapter has its final size from the start, at entries that do not matter yet. So the Trainer's
optimizer and scheduler are made once, over the parameters that they keep.
"""

import logging
import math
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from subnet_ft.adapter import SubnetConfig, SubnetModel
from subnet_ft.adapter.drift import off_mask_sums
from subnet_ft.adapter.inject import plan, sidecar_layers
from subnet_ft.adapter.targets import target_shapes
from subnet_ft.adapter.writing import read_entries
from subnet_ft.callback import SubnetCallback
from subnet_ft.errors import ConfigError
from subnet_ft.mask import SubnetMask
from subnet_ft.meter import SubnetMeterCallback, add_to_logs
from subnet_ft.sign_sgd import SignSGD

logger = logging.getLogger(__name__)

MASK_FILE = "mask.safetensors"
_WHICH = ("include", "exclude")  # options that say where to look, and nothing to a mask


class SubnetDiscoveryCallback(SubnetCallback):
    """A `SubnetCallback` without a mask: the run's first steps find one, and the rest trains it.

    The mask is written to ``output_dir/mask.safetensors``. Until it is known no checkpoint is
    saved, clipping does nothing and ``grad_norm`` is 0. A checkpoint of later resumes as any does,
    with that file beside it. Logs show the storages of both phases, ``subnet_bytes_discovery_*``
    and ``subnet_bytes_masked_*``: weights, gradients, optimizer state, and what discovery keeps.

    Args:
        steps: How many optimizer steps to look for; below 1, a share of the run's.
        keep: Share of every targeted parameter's entries to train.
        learning_rate: Of those steps, without a schedule: one for full finetuning. Default: a tenth
            of the run's, which is a subnetwork's.
        save_merged: As in `SubnetCallback`.
        **options: Of `SubnetConfig`: ``include`` and ``exclude`` (default: the linear layers),
            ``values_dtype``, ``clip``, ``weight_grad``.

    Raises:
        ConfigError: A value outside what is listed.

    Example:
        >>> callback = SubnetDiscoveryCallback(20, keep=0.02)
        >>> Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        steps: float,
        *,
        keep: float = 0.02,
        learning_rate: float | None = None,
        save_merged: str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if not (0 < steps < 1 or (steps >= 1 and steps == int(steps))):
            raise ConfigError(
                f"steps: expected a number of steps, or a share of them below 1, found {steps}"
            )
        if {"mask", "selector", "density", "seed"} & options.keys():
            raise ConfigError(
                "SubnetDiscoveryCallback: expected to find a mask itself, found mask, selector, "
                "density or seed; use keep=, or SubnetCallback"
            )
        if learning_rate is not None and not 0 < learning_rate < math.inf:
            raise ConfigError(f"learning_rate: expected one above 0, found {learning_rate}")
        super().__init__(SubnetConfig(density=keep, **options), save_merged=save_merged)
        self.steps, self.keep, self.options = steps, keep, options
        self.learning_rate = learning_rate
        self.discovering = True
        self._last = 0
        self._moving: dict[str, SignSGD] = {}
        self._bytes: dict[str, int] = {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach an adapter of the final size.

        Raises:
            ConfigError: As for `SubnetCallback`, or gradients that cannot be taken: of several
                processes, of fp16 (its scaler needs them), or inside a compiled graph.
        """
        for found, reason in (
            (args.world_size > 1 or args.n_gpu > 1, f"{args.world_size} processes or several GPUs"),
            (args.fp16, "fp16=True, whose scaler needs them; use bf16=True"),
            (args.torch_compile, "torch_compile=True, whose graphs keep their gradients"),
        ):
            if found:
                raise ConfigError(
                    f"SubnetDiscoveryCallback: expected one process's own gradients, found {reason}"
                )
        model: nn.Module = kwargs["model"]
        rest = {key: value for key, value in self.options.items() if key not in _WHICH}
        shapes = target_shapes(model, *(self.options.get(key) for key in _WHICH))
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        first = {n: torch.arange(max(1, round(self.keep * numel))) for n, numel in sizes.items()}
        self.config = SubnetConfig(mask=SubnetMask(first, shapes), **rest)
        super().on_init_end(args, state, control, **kwargs)
        self._mask_path = Path(args.output_dir) / MASK_FILE
        model.register_load_state_dict_pre_hook(self._adopt_saved)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle when to stop looking, and start.

        Raises:
            ConfigError: The run is over by then.
        """
        share = self.steps * state.max_steps if self.steps < 1 else self.steps
        self._last = math.ceil(share)
        if self._last >= state.max_steps:
            raise ConfigError(
                f"SubnetDiscoveryCallback: expected a run longer than the {self._last} steps it "
                f"looks for a mask, found {state.max_steps}; take fewer"
            )
        super().on_train_begin(args, state, control, **kwargs)
        if self.discovering:
            self._meter = None  # the values do not move yet
            rate = self.learning_rate or args.learning_rate / 10
            for layer in sidecar_layers(kwargs["model"]):
                (subnet,) = layer.subnets()
                sgd = SignSGD(layer.weight.data, rate / args.gradient_accumulation_steps)
                self._moving[layer.name], subnet.scout = sgd, sgd.count

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the weights; note what is stored in the last step without the mask and after it."""
        super().on_optimizer_step(args, state, control, **kwargs)
        for sgd in self._moving.values():
            sgd.move()
        if state.global_step + 1 in (self._last, self._last + 1):
            phase = "discovery" if self.discovering else "masked"
            stored = self._stored(kwargs["model"], kwargs["optimizer"])
            self._bytes |= {f"subnet_bytes_{phase}_{what}": size for what, size in stored.items()}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Hold back checkpoints until the mask is found, and find it when it is time."""
        if not self.discovering:
            return control
        model = kwargs["model"]
        if state.global_step >= self._last:
            self._decide(model)
            self._sums = off_mask_sums(model)
            if args.should_save:
                self._mask(model).save(self._mask_path, overwrite=True)
            SubnetMeterCallback.on_train_begin(self, args, state, control, **kwargs)
        elif control.should_save:
            control.should_save = False
            logger.warning(
                "no checkpoint at step %d: the mask is not known before step %d",
                state.global_step,
                self._last,
            )
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add what `SubnetCallback` does, and the storages once they are known."""
        super().on_log(args, state, control, **kwargs)
        add_to_logs(state, kwargs.get("logs"), self._bytes)
        self._bytes = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do what `SubnetCallback` does; a run that was ended too soon leaves the base behind."""
        if self.discovering:
            logger.warning("training ended before a mask was found: the weights are the base's")
            for sgd in self._moving.values():
                sgd.undo()
            self._stop_watching(kwargs["model"])
        super().on_train_end(args, state, control, **kwargs)

    def _decide(self, model: nn.Module) -> None:
        """Make the entries that moved furthest the adapter's, one parameter at a time.

        Raises:
            ConfigError: A gradient was not finite.
        """
        generator = torch.Generator().manual_seed(0)
        for layer in sidecar_layers(model):
            sgd = self._moving.pop(layer.name)
            if not sgd.finite():
                raise ConfigError(
                    f"{layer.name}: expected finite gradients, found others while looking for a "
                    "mask; the loss diverged or the data is damaged"
                )
            sgd.undo()
            (subnet,) = layer.subnets()
            indices = sgd.furthest(subnet.indices.numel(), generator)
            subnet.reseat(indices, read_entries(layer.weight.data, indices))
            subnet.values.data.add_(sgd.drift(indices))
            layer.flush()
        self._stop_watching(model)
        self.config._source = {
            "base_model": self.config.base_model_name_or_path or "",
            "rule": f"largest:{self.keep:g}",
            "source": f"signSGD, {self._last} steps",
        }

    def _stop_watching(self, model: nn.Module) -> None:
        self.discovering = False
        self._moving = {}
        for layer in sidecar_layers(model):
            for subnet in layer.subnets():
                subnet.scout = None

    def _mask(self, model: nn.Module) -> SubnetMask:
        subnets = {layer.name: layer.subnets()[0] for layer in sidecar_layers(model)}
        return SubnetMask(
            {name: subnet.indices.cpu() for name, subnet in subnets.items()},
            self.config._shapes,
            checksums={name: subnet.base_checksum for name, subnet in subnets.items()},
            metadata=self.config._source,
        )

    def _adopt_saved(self, model: nn.Module, state_dict: dict[str, Any], *args: Any) -> None:
        """Take the run's mask from its file when a checkpoint of it is about to be loaded.

        Raises:
            ConfigError: The file is not there.
            MaskMismatchError: It is of another base or of other parameters.
        """
        if not self.discovering or not any(SubnetModel.prefix in key for key in state_dict):
            return
        if not self._mask_path.is_file():
            raise ConfigError(
                f"expected {self._mask_path}, the mask this run found, beside its checkpoints, "
                "found none; put it back, or resume by SubnetCallback(mask)"
            )
        mask = SubnetMask.load(self._mask_path)
        entries = {e.name: e for e in plan(model, mask, mask.shapes, mask.checksums)}
        for layer in sidecar_layers(model):
            (subnet,) = layer.subnets()
            found = entries.get(layer.name)
            if found is None or found.indices.shape != subnet.indices.shape:
                raise ConfigError(
                    f"{layer.name}: expected the mask of this run, found one of other parameters "
                    f"or of another density in {self._mask_path}; resume with the same callback"
                )
            subnet.reseat(found.indices, found.originals)
        self.config._source = dict(mask.metadata)
        self._stop_watching(model)

    def _stored(self, model: nn.Module, optimizer: Any) -> dict[str, int]:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        return {
            "weights": _nbytes([*model.parameters(), *model.buffers()]),
            "gradients": _nbytes(gradients),
            "optimizer": _nbytes(state),
            "kept": _nbytes(t for s in self._moving.values() for t in (s.base, s.votes)),
        }


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Sum the storages behind some tensors, each once."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())
