"""What a training step holds: the state it keeps, and the most at each of its places."""

import gc
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from subnet_ft.gradient_release import ReleasedGradient
from subnet_ft.plan import steps
from subnet_ft.plan.methods import Method
from subnet_ft.plan.models import with_layers
from subnet_ft.plan.stand_ins import ATTENTION, fused_head, stand_ins
from subnet_ft.plan.steps import Setting
from subnet_ft.plan.tracker import Place, Tracker

STATE = ("weights", "reference", "values", "indices", "originals", "optimizer")
# Layers of the two short models whose step is traced: enough that the first two and the last two
# layers are places of their own, and in the longer one a layer between them.
DEPTHS = (4, 5)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step.

    Args:
        state: What stays between steps, by `STATE`; ``"values"`` are LoRA's matrices too.
        gradients: Held when backward ends.
        cache: The key-value cache of generation.
        peaks: Place -> the most there, and the gradients in it.
        parameters: How many the base model has.
        trained: How many numbers train.
    """

    state: dict[str, int]
    gradients: int
    cache: int
    peaks: dict[Place, tuple[int, int]]
    parameters: int
    trained: int

    @property
    def model_state(self) -> int:
        """State with the gradients, as DESIGN.md §5 counts."""
        return sum(self.state.values()) + self.gradients

    @property
    def where(self) -> Place:
        """Where the step holds most."""
        return max(self.peaks, key=lambda place: self.peaks[place][0])

    @property
    def peak(self) -> int:
        """The most a step holds."""
        return self.peaks[self.where][0]

    def parts(self) -> dict[str, int]:
        """Split the peak by what it is."""
        total, gradients = self.peaks[self.where]
        cache = self.cache if self.where[0] == "generate" else 0
        rest = total - sum(self.state.values()) - gradients - cache
        return self.state | {"gradients": gradients, "kv_cache": cache, "activations": rest}


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Sum the bytes of the storages of tensors, each once."""
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def state_of(
    model: nn.Module, reference: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """Weigh everything that stays between steps; of a real model or a fake one."""
    buffers = dict(model.named_buffers())
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted = any(not p.requires_grad for p in model.parameters())
    own = {id(p) for p in trained} if adapted else set()
    weights = [p for p in model.parameters() if id(p) not in own]
    beside = [b for name, b in buffers.items() if not name.endswith((".indices", ".originals"))]
    found: dict[str, Iterable[Any]] = {
        "weights": [*weights, *beside],
        "reference": [] if reference is None else [*reference.parameters(), *reference.buffers()],
        "values": trained if adapted else [],
        "indices": [b for name, b in buffers.items() if name.endswith(".indices")],
        "originals": [b for name, b in buffers.items() if name.endswith(".originals")],
        "optimizer": [t for state in optimizer.state.values() for t in state.values()],
    }
    return {kind: storage_bytes(found[kind]) for kind in STATE}


def build(
    config: PretrainedConfig, method: Method, setting: Setting, device: str = "gpu"
) -> tuple[nn.Module, nn.Module | None, torch.optim.Optimizer]:
    """Make what trains, its reference where that is a second model, and its optimizer."""

    def make(dtype: torch.dtype) -> Any:
        made = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION[device]
        )
        fused_head(made, steps.HEAD_OUTPUTS[setting.algorithm])
        return made

    model: Any = method.attach(make(method.weights))
    reference = None
    if setting.reference and not method.adapts:
        reference = make(torch.bfloat16).requires_grad_(False).eval()
    if setting.checkpointing:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if method.adapts:
            model.enable_input_require_grads()  # as TRL does
    model.train()
    return model, reference, method.optimizer([p for p in model.parameters() if p.requires_grad])


def first_step(trained: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state: a step on gradients that need no model."""
    torch.stack([p.sum(dtype=torch.float32) for p in trained]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def observe(
    model: nn.Module,
    reference: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    method: Method,
    setting: Setting,
) -> Footprint:
    """Take one step under a FakeTensorMode and note what it holds where."""
    trained = [p for p in model.parameters() if p.requires_grad]
    base: Any = model.get_base_model() if method.adapts else model  # type: ignore[operator]
    layers = base.get_decoder().layers
    with Tracker(layers):
        first_step(trained, optimizer)
    state = state_of(model, reference, optimizer)
    tracker, held = Tracker(layers), 0
    tracker.track_external(*(m for m in (model, reference, optimizer) if m is not None))
    tracker.follow(trained)

    def enter(phase: str) -> None:
        nonlocal held
        tracker.enter(phase)
        if phase == "step":
            held = storage_bytes(
                p.grad for p in trained if not isinstance(p.grad, ReleasedGradient)
            )

    with tracker:
        cache = steps.run(setting, model, reference, optimizer, enter, clips=method.clips)
    count = sum(p.numel() for p in model.parameters() if not (method.adapts and p.requires_grad))
    trains = sum(p.numel() for p in trained)
    return Footprint(state, held, cache, tracker.peaks, count, trains)


def trace(
    config: PretrainedConfig, method: Method, setting: Setting, device: str = "gpu"
) -> Footprint:
    """Trace one real step of a model as it is configured, all of its layers.

    Args:
        config: The model's.
        method: How it trains.
        setting: On what.
        device: Whose allocations to count, ``"gpu"`` or ``"cpu"``.
    """
    gc.collect()  # a model is a cycle, and what is left of the one before would be searched too
    with FakeTensorMode(), stand_ins(device):
        return observe(*build(config, method, setting, device), method, setting)


def trace_short(config: PretrainedConfig, method: Method, setting: Setting) -> Footprint:
    """Do `trace` by way of two models with few layers: as exact where all layers are alike.

    Each figure is then linear in the number of layers, and so is each place's peak. Between the
    first two layers and the last two it is linear in the layer as well, so none there has more.
    """
    layers = config.num_hidden_layers
    if layers <= DEPTHS[1] or not alike(config):
        return trace(config, method, setting)
    short, longer = (trace(with_layers(config, depth), method, setting) for depth in DEPTHS)

    def line(first: int, second: int) -> int:
        return first + (layers - DEPTHS[0]) * (second - first)

    return Footprint(
        {kind: line(short.state[kind], longer.state[kind]) for kind in STATE},
        line(short.gradients, longer.gradients),
        line(short.cache, longer.cache),
        {
            place: (line(peak, longer.peaks[place][0]), line(gradients, longer.peaks[place][1]))
            for place, (peak, gradients) in short.peaks.items()
        },
        line(short.parameters, longer.parameters),
        line(short.trained, longer.trained),
    )


def alike(config: PretrainedConfig) -> bool:
    """Tell whether all decoder layers have the same parameters and do the same."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    shapes = [[(n, p.shape) for n, p in m.named_parameters()] for m in model.get_decoder().layers]
    types = getattr(config, "layer_types", None) or [None]
    return all(s == shapes[0] for s in shapes) and len(set(types)) == 1
