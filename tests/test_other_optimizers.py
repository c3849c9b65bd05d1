"""Optimizers that are not ours, and a gradient scaler around ours, on the same adapter."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from subnet_ft import SubnetAdamW, SubnetConfig, SubnetError
from subnet_ft.adapter.inject import sidecar_layers
from tests.helpers import (
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    snapshot,
    tiny_llama,
    tokens,
)
from tests.training_helpers import arguments, stock_trainer

DENSITY = 0.7  # the larger weights keep over 4096 entries, below which bitsandbytes stays 32-bit
SMALL = list(itertools.product([32, 8], ["fp32", "residual"]))
UNCOMPRESSED = {"quantize": False, "master_weight_bits": None, "fused": False}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch.optim", "AdamW", {"lr": 1e-2, "foreach": False}),
    "adamw-foreach": ("torch.optim", "AdamW", {"lr": 1e-2, "foreach": True}),
    "adamw-fused": ("torch.optim", "AdamW", {"lr": 1e-2, "fused": True}),
    "sgd": ("torch.optim", "SGD", {"lr": 0.05, "momentum": 0.9}),
    "bnb-adamw-32": ("bitsandbytes.optim", "AdamW32bit", {"lr": 1e-2}),
    "bnb-adamw-8": ("bitsandbytes.optim", "AdamW8bit", {"lr": 1e-2}),
    "bnb-adamw-all-8": ("bitsandbytes.optim", "AdamW8bit", {"lr": 1e-2, "min_8bit_size": 1}),
    "bnb-lion-8": ("bitsandbytes.optim", "Lion8bit", {"lr": 3e-3}),
    "flashoptim-uncompressed": ("flashoptim", "FlashAdamW", {"lr": 1e-2, **UNCOMPRESSED}),
}


@pytest.fixture(params=OTHERS)
def make(request: pytest.FixtureRequest) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    package, name, options = OTHERS[request.param]
    module = pytest.importorskip(package)
    return lambda values: getattr(module, name)(values, **options)


def masked(**config: Any) -> tuple[Any, list[torch.Tensor]]:
    model = tiny_llama(torch.bfloat16)
    model = peft.get_peft_model(model, SubnetConfig(mask=random_mask(model, DENSITY), **config))
    return model, [p for p in model.parameters() if p.requires_grad]


def loss_of(model: Any, step: int) -> torch.Tensor:
    ids = tokens(seed=step % 4)
    return model(ids, labels=ids).loss


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_weights_hold_values(model)
        losses.append(loss.item())
    return losses


def assert_weights_hold_values(model: Any) -> None:
    for layer in sidecar_layers(model):
        subnet = layer.subnets()[0]
        held = layer.weight.flatten()[subnet.indices]
        assert_same_bits(held, subnet.values.detach().to(held.dtype), layer.name)


def assert_nothing_else_moved(model: Any) -> None:
    base, after = tiny_llama(torch.bfloat16), snapshot(model.get_base_model())
    assert_off_mask_untouched(snapshot(base), after, random_mask(base, DENSITY))


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


def test_trains_the_values_and_nothing_else(make: Any) -> None:
    model, values = masked()
    losses = train(model, make(values), range(24))
    assert sum(losses[-4:]) < sum(losses[:4]) - 4 * 0.5
    assert_nothing_else_moved(model)


def test_resume_equals_never_having_stopped(make: Any) -> None:
    model, values = masked()
    optimizer = make(values)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    resumed, resumed_values = masked()
    resumed_optimizer = make(resumed_values)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    train(resumed, resumed_optimizer, range(3, 6))
    assert_same(values, resumed_values)


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adamw_bnb_8bit", "lion_8bit"]
)
def test_in_a_trainer(optim: str, tmp_path: Path) -> None:
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")

    def run(directory: Path, steps: int, resume: bool = False) -> Any:
        rate = {"learning_rate": 0.1 if optim == "sgd" else 3e-3, "lr_scheduler_type": "constant"}
        saving = {"save_strategy": "steps", "save_steps": 6}
        args = arguments(directory, optim=optim, max_steps=steps, **rate, **saving)
        trainer = stock_trainer(masked()[0], args)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 12)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert_weights_hold_values(whole.model)
    assert_nothing_else_moved(whole.model)
    run(tmp_path / "parts", 6)
    assert_same(whole.model.parameters(), run(tmp_path / "parts", 12, True).model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it does without a GPU")
def test_flashoptim_refuses_a_cpu_and_changes_nothing() -> None:
    flashoptim = pytest.importorskip("flashoptim")
    model, values = masked()
    before = snapshot(model)
    for options in ({}, {"quantize": False}, {"quantize": False, "master_weight_bits": None}):
        with pytest.raises(NotImplementedError, match="requires a CUDA device"):
            flashoptim.FlashAdamW(values, **options)
    assert_same(snapshot(model).values(), before.values())


@pytest.mark.filterwarnings("ignore:master_weight_bits=None")
def test_flashoptim_on_bf16_values_is_refused_before_it_steps() -> None:
    flashoptim = pytest.importorskip("flashoptim")
    model, values = masked(values_dtype="bfloat16")
    before = snapshot(model)
    with pytest.raises(SubnetError, match='master="residual"'):
        train(model, flashoptim.FlashAdamW(values, **UNCOMPRESSED), range(1))
    assert_same(snapshot(model).values(), before.values())


def ours(bits: int, master: str, clip: str = "compact") -> tuple[Any, SubnetAdamW]:
    values_dtype = "bfloat16" if master == "residual" else "float32"
    model, values = masked(values_dtype=values_dtype, clip=clip)
    return model, SubnetAdamW(values, lr=1e-2, state_bits=bits, master=master)


def scaled_step(model: Any, optimizer: Any, scaler: torch.amp.GradScaler, loss: Any) -> None:
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert_weights_hold_values(model)


@pytest.mark.parametrize("clip", ["compact", "dense"])
@pytest.mark.parametrize(("bits", "master"), SMALL)
def test_a_gradient_scaler_changes_nothing(bits: int, master: str, clip: str) -> None:
    models = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        model, optimizer = ours(bits, master, clip)
        for step in range(4):
            scaled_step(model, optimizer, scaler, loss_of(model, step))
        models.append(model)
    assert_same(models[0].parameters(), models[1].parameters())


@pytest.mark.parametrize(("bits", "master"), SMALL)
def test_a_step_the_scaler_skips_leaves_everything_as_it_was(bits: int, master: str) -> None:
    model, optimizer = ours(bits, master)
    scaler = torch.amp.GradScaler("cpu")
    scaled_step(model, optimizer, scaler, loss_of(model, 0))
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
    scaled_step(model, optimizer, scaler, loss_of(model, 1) * math.inf)
    assert scaler.get_scale() == 2.0**15
    assert_same(snapshot(model).values(), before.values())
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    scaled_step(model, optimizer, scaler, loss_of(model, 1))
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
