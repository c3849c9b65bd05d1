"""release_gradients: the same steps, one gradient at a time; what needs more is refused."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist

from subnet_ft import SubnetAdamW, SubnetConfig, SubnetError
from subnet_ft.adapter.inject import sidecar_layers
from tests.helpers import assert_same_bits, random_mask, snapshot, tiny_llama, tokens
from tests.training_helpers import arguments, stock_trainer


def masked(dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, list[torch.Tensor]]:
    model: Any = tiny_llama(dtype)
    model = peft.get_peft_model(model, SubnetConfig(mask=random_mask(model), **config))
    return model, [p for p in model.parameters() if p.requires_grad]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for step in range(steps):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("dtype", "options", "config"),
    [
        (torch.float32, {}, {}),
        (torch.bfloat16, {"state_bits": 8}, {}),
        (torch.bfloat16, {"master": "residual"}, {"values_dtype": "bfloat16"}),
    ],
    ids=["fp32", "8-bit", "residual"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_released_steps_equal_ordinary_ones(
    dtype: torch.dtype, options: dict[str, Any], config: dict[str, Any], checkpointing: bool
) -> None:
    models = []
    for release in (True, False):
        model, values = masked(dtype, **config)
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        train(model.train(), SubnetAdamW(values, 1e-2, release_gradients=release, **options))
        models.append(model)
    for (name, released), ordinary in zip(
        snapshot(models[0]).items(), snapshot(models[1]).values(), strict=True
    ):
        assert_same_bits(released, ordinary, name)
    for layer in sidecar_layers(models[0]):
        subnet = layer.subnets()[0]
        written = layer.weight.detach().flatten()[subnet.indices]
        assert_same_bits(written, subnet.values.detach().to(written.dtype), layer.name)


def test_no_two_gradients_exist_at_once() -> None:
    model, values = masked()
    SubnetAdamW(values, release_gradients=True)
    most = 0

    def count(_: torch.Tensor) -> None:
        nonlocal most
        stored = [p for p in values if type(p.grad) is torch.Tensor]
        most = max(most, len(stored))

    for value in values:
        value.register_post_accumulate_grad_hook(count)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert most == 0  # by the time a later hook runs, even this parameter's is gone
    assert all(p.grad is not None for p in values)


def test_resume_equals_never_having_stopped() -> None:
    whole, values = masked()
    train(whole, SubnetAdamW(values, 1e-2, release_gradients=True), 4)
    first, first_values = masked()
    optimizer = SubnetAdamW(first_values, 1e-2, release_gradients=True)
    saved: list[dict[str, Any]] = []
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    for step in range(4):
        if step == 2:  # another process: all from the state
            saved = [copy.deepcopy(o.state_dict()) for o in (first, optimizer, scheduler)]
            first, first_values = masked()
            optimizer = SubnetAdamW(first_values, 1e-2, release_gradients=True)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
            for one, state in zip((first, optimizer, scheduler), saved, strict=True):
                one.load_state_dict(state)
        first(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for a, b in zip(values, first_values, strict=True):
        assert_same_bits(a, b)


def test_groups_added_later_are_stepped_at_their_own_rate() -> None:
    model, values = masked()
    optimizer = SubnetAdamW(values[:1], lr=1e-2, release_gradients=True)
    optimizer.add_param_group({"params": values[1:], "lr": 0.0})
    before = [v.detach().clone() for v in values]
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    moved = [not torch.equal(v, b) for v, b in zip(values, before, strict=True)]
    assert moved == [True] + [False] * (len(values) - 1)
    assert all(optimizer.state[v]["step"] == 1 for v in values)


def test_a_second_optimizer_takes_over_from_the_first() -> None:
    model, values = masked()
    first = SubnetAdamW(values, release_gradients=True)
    second = SubnetAdamW(values, release_gradients=True)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert not first.state and len(second.state) == len(values)


def test_clipping_is_refused() -> None:
    model, values = masked()
    SubnetAdamW(values, release_gradients=True)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with pytest.raises(SubnetError, match="max_grad_norm=0"):
        torch.nn.utils.clip_grad_norm_(values, 1.0)


def test_accumulation_is_refused() -> None:
    model, values = masked()
    SubnetAdamW(values, release_gradients=True)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with pytest.raises(SubnetError, match="accumulation"):
        model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_a_grad_scaler_is_refused() -> None:
    model, values = masked()
    optimizer = SubnetAdamW(values, release_gradients=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=tokens(), labels=tokens()).loss).backward()
    with pytest.raises(SubnetError, match="GradScaler"):
        scaler.step(optimizer)


def test_dense_clipping_is_refused_before_a_step() -> None:
    model, values = masked(clip="dense")
    before = snapshot(model)
    SubnetAdamW(values, release_gradients=True)
    with pytest.raises(SubnetError, match="clip="):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, weight in snapshot(model).items():
        assert_same_bits(weight, before[name], name)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, values = masked()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(SubnetError, match="one process, found 2"):
        SubnetAdamW(values, release_gradients=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, None),
        ({"max_grad_norm": 1.0}, "max_grad_norm=0"),
        ({"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}, "without a step"),
    ],
)
def test_in_a_trainer(tmp_path: Path, options: dict[str, Any], message: str | None) -> None:
    model, _ = masked()
    before = snapshot(model)
    trainer = stock_trainer(model, arguments(tmp_path, **options))
    trainer.optimizer_cls_and_kwargs = (SubnetAdamW, {"lr": 1e-2, "release_gradients": True})
    if message is None:
        trainer.train()
        assert any(not torch.equal(w, before[n]) for n, w in snapshot(model).items())
    else:
        with pytest.raises(SubnetError, match=message):
            trainer.train()
        if "gradient_accumulation_steps" in options:  # seen before anything was stepped
            for name, weight in snapshot(model).items():
                assert_same_bits(weight, before[name], name)
