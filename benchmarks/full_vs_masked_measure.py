"""Where a training step's time goes, and what is stored meanwhile."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.quantized import storage_bytes
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.adapter.writing import flush_all

FLUSHES = 5


class PhaseClock(TrainerCallback):
    """Times a TRL trainer's steps by phase, by wrapping what it calls.

    A phase within another is taken out of it. What is no phase is "other". Where gradients are
    released, the optimizer's time is in "backward".

    Args:
        trainer: Built, not yet training.
        module: Whose `use_adapter` switches its adapter off for a reference.
        at_step: Called before every optimizer step, when all gradients are there.
        wait: Called before every step; what it takes does not count.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        at_step: Callable[[], None],
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._mark = 0.0
        self._at_step, self._wait = at_step, wait
        self._wrap(trainer, "compute_loss", "forward")
        self._wrap(trainer.accelerator, "backward", "backward")
        self._wrap(trainer.accelerator, "clip_grad_norm_", "clip")
        if hasattr(trainer, "_generate"):
            self._wrap(trainer, "_generate", "generation")
        if getattr(trainer, "ref_model", None) is not None:
            self._wrap(trainer.ref_model, "forward", "reference")
        self._module = module
        self._use_adapter = getattr(module, "use_adapter", None)
        if self._use_adapter is not None:
            module.use_adapter = self._timed_use_adapter
        trainer.add_callback(self)

    @staticmethod
    def medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Median seconds of each phase of these steps, and of the whole "step"."""
        names = {name for step in steps for name in step}
        return {name: median(step.get(name, 0.0) for step in steps) for name in sorted(names)}

    def close(self) -> None:
        """Take the wrapper off the module again, which outlives the trainer."""
        if self._use_adapter is not None:
            self._module.use_adapter = self._use_adapter

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count time as this phase's, until it ends or another begins within it."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._now[self._open[-1] if self._open else "other"] += now - self._mark
        self._mark = now

    def _wrap(self, owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def _timed_use_adapter(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        assert self._use_adapter is not None
        with self.phase("reference"), self._use_adapter(*args, **kwargs):
            yield

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start a step."""
        self._wait()
        self._charge()
        self._now.clear()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Enter the optimizer's step."""
        self._at_step()
        self._charge()
        self._open.append("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Leave it."""
        self._charge()
        self._open.pop()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Close a step."""
        self._charge()
        self.steps.append(dict(self._now) | {"step": sum(self._now.values())})


def flush_seconds(model: nn.Module) -> float | None:
    """What writing all values into the weights takes by itself; None without a mask."""
    layers = list(sidecar_layers(model))
    if not layers:
        return None
    seconds = []
    for _ in range(FLUSHES):
        start = time.perf_counter()
        flush_all(layers)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def state_bytes(trainer: Any) -> dict[str, int]:
    """Summed storages of all that is stored at an optimizer step, each once, by what it is."""
    model = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = hasattr(model, "peft_config")
    buffers = dict(model.named_buffers())
    indices = [b for name, b in buffers.items() if "indices" in name]
    indices += [i for m in model.modules() for i in getattr(m, "shira_indices", {}).values()]
    originals = [b for name, b in buffers.items() if name.endswith(".originals")]
    reference = getattr(trainer, "ref_model", None)
    kinds: dict[str, Iterable[Any]] = {
        "weights": [p for p in model.parameters() if not (adapter and p.requires_grad)],
        "values": trained if adapter else [],
        "indices": indices,
        "originals": originals,
        "gradients": [p.grad for p in trained if type(p.grad) is torch.Tensor],
        "optimizer": optimizer_tensors(trainer.optimizer),
        "reference": [] if reference is None else list(reference.parameters()),
        "buffers": list(buffers.values()),
    }
    seen: set[int] = set()
    sizes = {}
    for kind, tensors in kinds.items():
        new = [t for t in tensors if t.untyped_storage().data_ptr() not in seen]
        seen |= {t.untyped_storage().data_ptr() for t in new}
        sizes[kind] = storage_bytes(new)
    return sizes


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Every tensor of an optimizer's state, those inside other objects too."""
    found = []
    items = list(optimizer.state.values())
    while items:
        item = items.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple):
            items += item.values() if isinstance(item, dict) else item
        elif hasattr(item, "__dict__"):
            items += vars(item).values()
    return found
