"""The learning meter: its figures against the same counted by hand, and where it shows them."""

import logging
from pathlib import Path

import peft
import pytest
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from subnet_ft import SubnetCallback, SubnetConfig, SubnetMeter, SubnetMeterCallback
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.errors import ConfigError
from subnet_ft.meter import PATIENCE
from tests.helpers import assert_same_bits, random_mask, snapshot, tiny_llama, tokens
from tests.training_helpers import arguments, stock_trainer, text_dataset, tiny_tokenizer

KEYS = {"subnet_grad_share", "subnet_flipped", "subnet_flipped_so_far", "subnet_never_moved"}


def _loss(model: torch.nn.Module) -> torch.Tensor:
    ids = tokens()
    return model(input_ids=ids, labels=ids).loss


def _values(model: torch.nn.Module) -> torch.Tensor:
    values = [s.values.detach().clone() for la in sidecar_layers(model) for s in la.subnets()]
    return torch.cat(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_those_counted_by_hand(dtype: torch.dtype) -> None:
    dense = tiny_llama(dtype, tied=False)
    mask = random_mask(dense, 0.1)
    _loss(dense).backward()
    gradients = {name: p.grad.double().flatten() for name, p in dense.named_parameters()}
    inside = sum(gradients[name][mask[name].long()].square().sum() for name in mask)
    whole = sum(gradients[name].square().sum() for name in mask)

    model = peft.get_peft_model(tiny_llama(dtype, tied=False), SubnetConfig(mask=mask))
    meter = SubnetMeter(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    base = _values(model).bfloat16()
    for step in range(2):
        before = _values(model).bfloat16()
        meter.start()
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        measured = meter.stop()
        after = _values(model).bfloat16()
        assert set(measured) == KEYS
        if step == 0:
            assert measured["subnet_grad_share"] == pytest.approx((inside / whole).item(), rel=1e-4)
        assert measured["subnet_flipped"] == (after != before).sum() > 0
        assert measured["subnet_flipped_so_far"] == (after != base).sum()
        assert measured["subnet_never_moved"] == pytest.approx((after == base).double().mean())
    _loss(model).backward()
    assert not meter.running and not meter._before and len(meter._squares) == len(mask)


def test_a_measured_run_is_the_unmeasured_run(tmp_path: Path) -> None:
    runs = []
    for steps in (1, 10):  # all steps measured, none
        model = tiny_llama(torch.bfloat16)
        args = arguments(tmp_path, max_steps=3, logging_steps=steps)
        stock_trainer(model, args, [SubnetCallback(random_mask(model))]).train()
        runs.append(snapshot(model))
    for name, weight in runs[0].items():
        assert_same_bits(weight, runs[1][name], name)


class Tracker(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("way", ["peft_config", "callback"])
def test_logged_steps_hold_the_figures(way: str, tmp_path: Path) -> None:
    model = tiny_llama()
    mask = random_mask(model)
    how = (
        {"peft_config": SubnetConfig(mask=mask), "callbacks": [SubnetMeterCallback()]}
        if way == "peft_config"
        else {"callbacks": [SubnetCallback(mask)]}
    )
    trainer = SFTTrainer(
        model,
        args=arguments(
            tmp_path,
            SFTConfig,
            logging_steps=2,
            logging_first_step=True,
            gradient_accumulation_steps=2,
        ),
        train_dataset=text_dataset(),
        processing_class=tiny_tokenizer(),
        **how,
    )
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    *steps, last = trainer.state.log_history
    assert [log["step"] for log in steps] == [1, 2, 4]
    for log, seen in zip(steps, tracker.seen, strict=False):
        assert KEYS <= set(log) and KEYS <= set(seen)
        assert 0 < log["subnet_grad_share"] < 1 and log["subnet_flipped"] > 0
    assert not KEYS & set(last)
    assert steps[0]["subnet_flipped_so_far"] == steps[0]["subnet_flipped"]
    assert all(s.observer is None for la in sidecar_layers(trainer.model) for s in la.subnets())


def test_compact_gradients_have_no_share(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    config = SubnetConfig(mask=random_mask(model), weight_grad="compact")
    trainer = stock_trainer(model, arguments(tmp_path, max_steps=2), [SubnetCallback(config)])
    trainer.train()
    assert KEYS - {"subnet_grad_share"} <= set(trainer.state.log_history[0])
    assert "subnet_grad_share" not in trainer.state.log_history[0]
    assert caplog.text.count("subnet_grad_share is not logged") == 1


@pytest.mark.parametrize("rate", [1e-9, 1e-2])
def test_one_warning_where_nothing_moves(
    rate: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    args = arguments(tmp_path, max_steps=PATIENCE + 2, learning_rate=rate, weight_decay=0.0)
    with caplog.at_level(logging.WARNING, "subnet_ft"):
        stock_trainer(model, args, [SubnetCallback(random_mask(model))]).train()
    warned = [r.getMessage() for r in caplog.records if "have moved" in r.getMessage()]
    assert len(warned) == (rate < 1e-8)
    assert all(text.startswith(f"after {PATIENCE} steps 0") for text in warned)


def test_no_subnetwork(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a model with a subnetwork that trains"):
        SubnetMeter(tiny_llama())
