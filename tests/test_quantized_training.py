"""Training on bitsandbytes bases: TRL's trainers, optimizers, checkpoints, resuming."""

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from subnet_ft import SubnetAdamW, SubnetConfig, SubnetMeter
from subnet_ft.adapter.drift import drifted, off_mask_sums
from subnet_ft.adapter.inject import sidecar_layers
from tests.helpers import assert_same_bits
from tests.quantized_helpers import (
    BF16,
    FP32,
    IDS,
    Bases,
    attach,
    four_bit,
    full_precision,
    load,
    logits,
    mask_of,
    save_bases,
    shift,
    step,
    trained,
)
from tests.training_helpers import arguments, preference_dataset, text_dataset, tiny_tokenizer


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return save_bases(tmp_path_factory.mktemp("bases"))


def sft(model: Any, directory: Path, config: SubnetConfig | None = None, **kwargs: Any) -> Any:
    defaults = {"gradient_checkpointing": False, "learning_rate": 1e-3}
    return SFTTrainer(
        model,
        arguments(directory, SFTConfig, **(defaults | kwargs)),
        train_dataset=text_dataset(),
        eval_dataset=text_dataset(8),
        processing_class=tiny_tokenizer(),
        peft_config=config,
    )


def values_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        layer.name: layer.subnet("default").values.detach().clone()
        for layer in sidecar_layers(model)
    }


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert_same_bits(values, b[name], name)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_values_train_in_fp32_under_sft(bases: Bases, kind: str, tmp_path: Path) -> None:
    """TRL casts what trains on a quantized base to bf16; whatever is not quantized as well."""
    trainer = sft(load(bases, kind), tmp_path, SubnetConfig(mask=mask_of()))
    base = trainer.model.get_base_model()
    before, start = off_mask_sums(base), values_of(trainer.model)
    trainer.train()
    assert not drifted(before, off_mask_sums(base))
    for name, values in values_of(trainer.model).items():
        assert values.dtype == FP32
        assert not torch.equal(values, start[name]), f"{name} never trained"
        assert not torch.equal(values, values.to(BF16).float()), f"{name} has bf16's precision"
    found = logits(trainer.model)
    torch.testing.assert_close(
        logits(trainer.model.merge_and_unload()).float(), found.float(), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_checkpointing_of_both_kinds_changes_nothing(
    bases: Bases, kind: str, tmp_path: Path
) -> None:
    runs = []
    for reentrant in (None, False, True):
        trainer = sft(
            load(bases, kind),
            tmp_path,
            SubnetConfig(mask=mask_of()),
            gradient_checkpointing=reentrant is not None,
            gradient_checkpointing_kwargs={"use_reentrant": bool(reentrant)},
        )
        trainer.train()
        runs.append(values_of(trainer.model))
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_resuming_is_never_having_stopped(bases: Bases, kind: str, tmp_path: Path) -> None:
    def run(steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        trainer = sft(
            load(bases, kind, BF16),
            tmp_path,
            SubnetConfig(mask=mask_of()),
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train(resume_from_checkpoint=resume)
        return values_of(trainer.model)

    through = run(4)
    for directory in tmp_path.glob("checkpoint-4"):
        directory.rename(tmp_path / "through")
    assert_equal(run(4, resume=True), through)


def test_a_loaded_adapter_is_not_rounded(bases: Bases, tmp_path: Path) -> None:
    """What it learned before is kept where TRL casts it to bf16, to the bit."""
    model = attach(four_bit(bases, BF16))
    shift(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        four_bit(bases, BF16), tmp_path / "adapter", is_trainable=True
    )
    trainer = sft(again, tmp_path)
    assert_equal(values_of(trainer.model), values_of(model))


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "pre-wrapped"])
def test_dpo_is_dpo_on_the_dequantized_model(bases: Bases, wrapped: bool, tmp_path: Path) -> None:
    """Its reference too, which is this model with the adapter switched off."""
    runs = []
    for quantized in (True, False):
        model = four_bit(bases) if quantized else full_precision(four_bit(bases), FP32)
        config = SubnetConfig(mask=mask_of(), weight_grad="compact")
        trainer = DPOTrainer(
            attach(model, weight_grad="compact") if wrapped else model,
            args=arguments(tmp_path, DPOConfig, bf16=False, gradient_checkpointing=False),
            train_dataset=preference_dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=None if wrapped else config,
        )
        trainer.train()
        runs.append((values_of(trainer.model), trainer.state.log_history))
    assert_equal(runs[0][0], runs[1][0])
    for key in ("loss", "rewards/chosen"):
        assert [log.get(key) for log in runs[0][1]] == [log.get(key) for log in runs[1][1]]


def test_prepared_for_kbit_training(bases: Bases) -> None:
    """Everything but the quantized layers in fp32, which compute in bf16."""
    model = attach(peft.prepare_model_for_kbit_training(four_bit(bases, BF16)))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert {v.dtype for v in values_of(model).values()} == {FP32}
    assert {p.dtype for p in model.merge_and_unload().parameters()} == {FP32}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("released", [False, True])
def test_subnet_adamw_is_adamw(bases: Bases, kind: str, released: bool) -> None:
    """Also where values are stepped within backward: each layer's inputs come first."""
    runs = []
    for ours in (True, False):
        model = attach(load(bases, kind))
        options = {"lr": 1e-2, "weight_decay": 0.1}
        optimizer = (
            SubnetAdamW(trained(model), release_gradients=released, **options)
            if ours
            else torch.optim.AdamW(trained(model), fused=True, **options)
        )
        losses = [step(model, optimizer) for _ in range(3)]
        runs.append((losses, values_of(model)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


def test_bf16_values_with_a_residual(bases: Bases) -> None:
    model = attach(four_bit(bases, BF16), values_dtype="bfloat16")
    optimizer = SubnetAdamW(trained(model), lr=1e-2, state_bits=8, master="residual")
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert {v.dtype for v in values_of(model).values()} == {BF16}


def test_a_cast_in_place_is_not_taken_and_said(
    bases: Bases, caplog: pytest.LogCaptureFixture
) -> None:
    model = attach(four_bit(bases))
    shift(model)
    before = values_of(model)
    with caplog.at_level(logging.INFO):
        for values in trained(model):
            values.data = values.data.to(BF16)
    assert "stay torch.float32" in caplog.text
    assert_equal(values_of(model), before)
    for values in trained(model):  # other contents are taken, in fp32
        values.data = torch.ones_like(values, dtype=BF16)
    assert all(values.dtype == FP32 and (values == 1).all() for values in trained(model))


def test_the_learning_meter_counts(bases: Bases) -> None:
    model = attach(four_bit(bases))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    meter = SubnetMeter(model)
    meter.start()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    figures = meter.stop()
    assert figures["subnet_flipped"] > 0 and "subnet_grad_share" not in figures
