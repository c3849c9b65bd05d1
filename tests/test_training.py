"""The exact promises of training: equal to full finetuning, to a dense masked run, to no stop."""

import copy
import functools
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from subnet_ft import SubnetCallback, SubnetConfig
from subnet_ft.adapter.inject import sidecar_layers
from tests.helpers import (
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    snapshot,
    tiny_llama,
    tokens,
)
from tests.reference import DenseMaskedRun
from tests.training_helpers import (
    arguments,
    preference_dataset,
    stock_trainer,
    text_dataset,
    tiny_tokenizer,
)

# torch's fused CPU step rounds an entry differently in its vector body and in its scalar tail, so
# there an entry's position matters: the reference then steps compact tensors too.
OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "adamw_fused": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_density_one_is_full_finetuning(optim: str, tmp_path: Path) -> None:
    def run(config: SubnetConfig | None) -> tuple[dict[str, torch.Tensor], list[float]]:
        args = arguments(tmp_path, SFTConfig, optim=optim, gradient_accumulation_steps=2)
        trainer = SFTTrainer(
            tiny_llama(),
            args,
            train_dataset=text_dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=config,
        )
        trainer.train()
        model = trainer.model if config is None else trainer.model.merge_and_unload()
        return snapshot(model), [log["loss"] for log in trainer.state.log_history if "loss" in log]

    start = snapshot(tiny_llama())
    full, full_losses = run(None)
    masked, masked_losses = run(SubnetConfig(selector="random", density=1.0, include="all"))
    assert masked_losses == full_losses
    assert full.keys() == masked.keys()
    for name, weight in full.items():
        assert_same_bits(weight, masked[name], name)
        assert not torch.equal(weight, start[name]), f"{name} never trained"
    assert max(w.numel() for w in full.values()) > 4096


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_dense_masked_reference(
    optimizer: str, tied: bool, dtype: torch.dtype, density: float
) -> None:
    make = OPTIMIZERS[optimizer]
    dense = tiny_llama(dtype, tied=tied)
    mask = random_mask(dense, density)
    reference = DenseMaskedRun(dense, mask, make, compact_step=optimizer == "adamw_fused")
    model = peft.get_peft_model(tiny_llama(dtype, tied=tied), SubnetConfig(mask=mask))
    trained = [p for p in model.parameters() if p.requires_grad]
    stepper = make(trained)
    for step in range(5):
        batches = [tokens(seed=10 * step + i) for i in range(2)]
        reference.step(*batches)
        for ids in batches:
            (model(ids, labels=ids).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        stepper.step()
        stepper.zero_grad()
    for layer in sidecar_layers(model):
        values = layer.subnets()[0].values
        expected = reference.masters[layer.name].flatten()[mask[layer.name].long()]
        assert_same_bits(values, expected, layer.name)
        assert_same_bits(layer.weight, reference.weights[layer.name], layer.name)


def test_fused_adamw_depends_on_position() -> None:
    """The reason for the reference's compact step; if torch changes this, drop that."""
    torch.manual_seed(0)
    start, gradient = torch.randn(67), torch.randn(67)

    def stepped(select: slice) -> torch.Tensor:
        parameter = torch.nn.Parameter(start[select].clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, fused=True)
        for step in range(20):
            parameter.grad = (gradient * (step + 1.3) ** 0.5)[select].clone()
            optimizer.step()
        return parameter.detach()

    assert not torch.equal(stepped(slice(0, 67))[64:], stepped(slice(64, 67))) or not torch.equal(
        stepped(slice(0, 67))[:7], stepped(slice(0, 7))
    )


def test_dense_clip_sees_the_dense_norm() -> None:
    for tied in (True, False):
        mask = random_mask(tiny_llama(tied=tied), 0.2)
        dense = tiny_llama(tied=tied)
        ids = tokens()
        dense(ids, labels=ids).loss.backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in dense.parameters()])
        model = peft.get_peft_model(tiny_llama(tied=tied), SubnetConfig(mask=mask, clip="dense"))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        model(ids, labels=ids).loss.backward()
        found = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        optimizer.step()
        scalars = [p for p in trained if p.ndim == 0]
        assert scalars and not any(optimizer.state[p] for p in scalars)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_dpo_reference_is_the_base(checkpointing: bool, tmp_path: Path) -> None:
    """DPO's reference pass runs between policy forward and backward, on the same storage."""
    mask = random_mask(tiny_llama(), 0.1)

    def run(reference: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
        args = arguments(tmp_path, DPOConfig, gradient_checkpointing=checkpointing, bf16=False)
        model = tiny_llama()
        trainer = DPOTrainer(
            model if reference is None else peft.get_peft_model(model, SubnetConfig(mask=mask)),
            reference,
            args,
            train_dataset=preference_dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=SubnetConfig(mask=mask) if reference is None else None,
        )
        trainer.train()
        history = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return snapshot(trainer.model.merge_and_unload()), history

    ours, our_losses = run(None)
    second, second_losses = run(tiny_llama())  # a second model as the reference
    assert our_losses == second_losses and our_losses[-1] < our_losses[0]
    for name, weight in ours.items():
        assert_same_bits(weight, second[name], name)
    assert_off_mask_untouched(snapshot(tiny_llama()), ours, mask)


def test_dpo_on_a_wrapped_model_copies_the_reference(tmp_path: Path) -> None:
    """TRL gives a pre-wrapped model a second adapter "ref" with the first one's values."""
    model = peft.get_peft_model(tiny_llama(), SubnetConfig(mask=random_mask(tiny_llama(), 0.1)))
    for layer in sidecar_layers(model):
        layer.subnets()[0].values.data.mul_(1.01)
    model.flush()
    start = snapshot(model.get_base_model())
    args = arguments(tmp_path, DPOConfig, max_steps=2)
    trainer = DPOTrainer(
        model, None, args, train_dataset=preference_dataset(), processing_class=tiny_tokenizer()
    )
    trainer.train()
    trained = snapshot(model.get_base_model())
    model.set_adapter("ref")
    for layer in sidecar_layers(model):
        assert_same_bits(layer.weight, start[layer.name], layer.name)
        assert layer.subnet_ft_values["ref"].indices is layer.subnet_ft_values["default"].indices
    assert not torch.equal(trained["model.norm.weight"], start["model.norm.weight"])


def test_no_second_copy_of_the_model() -> None:
    """All live tensors: the weights, and per masked entry its index, values, original and grad."""
    gc.collect()
    before = _storage_bytes()
    model = tiny_llama(torch.bfloat16, vocab=4096)
    weights = _storage_bytes() - before
    mask = random_mask(model, 0.05)
    model = peft.get_peft_model(model, SubnetConfig(mask=mask))
    mask_bytes = sum(mask[name].nbytes for name in mask)
    ids = tokens()
    with model.disable_adapter(), torch.no_grad():
        model(ids)
    model(ids, labels=ids).loss.backward()
    gc.collect()
    state = _storage_bytes() - before - weights - mask_bytes
    # index 8, values 4, original 2, gradient 4; half a KiB a tensor for scalars and buffers
    assert state <= mask.nnz * (8 + 4 + 2 + 4) + 512 * len(mask)


def _storage_bytes() -> int:
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and not item.is_meta:
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def _resumable(
    mode: str, directory: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A stock Trainer on a masked model, as PeftModel or by callback, that saves every 3 steps."""
    model: Any = tiny_llama(dtype)
    config = SubnetConfig(mask=random_mask(model, 0.1))
    args = arguments(directory, max_steps=8, save_strategy="steps", save_steps=3)
    if mode == "peft":
        return stock_trainer(peft.get_peft_model(model, config), args), snapshot(model)
    return stock_trainer(model, args, [SubnetCallback(config)]), snapshot(model)


def _values(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        layer.name: layer.subnets()[0].values.detach().clone()
        for layer in sidecar_layers(trainer.model)
    }


@pytest.mark.parametrize("mode", ["peft", "callback"])
def test_killed_and_resumed_equals_uninterrupted(mode: str, tmp_path: Path) -> None:
    whole, _ = _resumable(mode, tmp_path / "whole")
    whole.train()

    script = f"""
import os, signal
from pathlib import Path
from transformers import TrainerCallback
from tests.test_training import _resumable

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

trainer, _ = _resumable({mode!r}, Path({str(tmp_path / "killed")!r}))
trainer.add_callback(Kill())
trainer.train()
"""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels' / 'torch-ext'}"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL

    resumed, _ = _resumable(mode, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-3"))
    expected, found = _values(whole), _values(resumed)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert_same_bits(values, found[name], name)
    for (name, a), b in zip(
        snapshot(whole.model).items(), snapshot(resumed.model).values(), strict=True
    ):
        assert_same_bits(a, b, name)


def test_best_model_is_loaded_into_the_weights(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.3,
    )
    model = peft.get_peft_model(tiny_llama(), SubnetConfig(mask=random_mask(tiny_llama(), 0.2)))
    trainer = stock_trainer(model, args)
    trainer.train()
    best = peft.PeftModel.from_pretrained(tiny_llama(), trainer.state.best_model_checkpoint)
    for name, weight in snapshot(best.get_base_model()).items():
        assert_same_bits(weight, dict(model.get_base_model().named_parameters())[name], name)


def test_deepcopy_trains_apart() -> None:
    model = peft.get_peft_model(tiny_llama(), SubnetConfig(mask=random_mask(tiny_llama(), 0.2)))
    twin = copy.deepcopy(model)
    before = snapshot(model)
    ids = tokens()
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    twin(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, weight in snapshot(model).items():
        assert_same_bits(weight, before[name], name)
    layer = next(sidecar_layers(twin))
    indices = layer.subnets()[0].indices
    assert torch.equal(layer.weight.flatten()[indices], layer.subnets()[0].values)
    assert not torch.equal(layer.weight, before[f"base_model.model.{layer.name}"])
