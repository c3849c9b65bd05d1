"""SubnetCallback in the stock Trainer."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from subnet_ft import SubnetCallback, SubnetConfig
from subnet_ft.adapter.drift import drifted, off_mask_sums
from subnet_ft.adapter.inject import sidecar_layers
from tests.helpers import (
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    snapshot,
    tiny_llama,
)
from tests.training_helpers import arguments, stock_trainer


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in snapshot(model).items() if "subnet_ft" not in n}


def test_one_line_masks_a_stock_trainer(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    base, mask = snapshot(model), random_mask(model, 0.1)
    mask.save(tmp_path / "mask.safetensors")
    args = arguments(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=3)
    callback = SubnetCallback(tmp_path / "mask.safetensors", save_merged=tmp_path / "merged")
    trainer = stock_trainer(model, args, [callback])
    trainer.train()

    trained = _weights(model)
    assert_off_mask_untouched(base, trained, mask)
    assert not torch.equal(trained["model.norm.weight"], base["model.norm.weight"])
    assert trainer.state.log_history[0]["subnet_density"] == pytest.approx(mask.density)
    assert trainer.state.log_history[-1]["subnet_drifted_tensors"] == 0

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    adapter = peft.PeftModel.from_pretrained(tiny_llama(torch.bfloat16), checkpoint)
    for name, weight in trained.items():
        assert_same_bits(weight, merged.get_parameter(name).detach(), name)
        assert_same_bits(weight, snapshot(adapter.get_base_model())[name], name)


def test_checkpoints_hold_the_subnetwork_alone(tmp_path: Path) -> None:
    model = tiny_llama(vocab=2048)
    mask = random_mask(model, 0.05)
    args = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    stock_trainer(model, args, [SubnetCallback(mask)]).train()
    checkpoint = tmp_path / "checkpoint-1"
    tensors = load_file(checkpoint / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == mask.nnz + len(mask)  # values, mask ids
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(s["exp_avg"].numel() for s in state.values()) == mask.nnz


def test_drift_is_seen_wherever_it_happens() -> None:
    model = tiny_llama()
    mask = random_mask(model, 0.1)
    peft.get_peft_model(model, SubnetConfig(mask=mask))
    before = off_mask_sums(model)
    assert set(before) == set(mask.shapes)
    layer = next(sidecar_layers(model))
    layer.subnets()[0].values.data.add_(1)
    layer.flush()
    assert drifted(before, off_mask_sums(model)) == []
    inside = set(mask["model.norm.weight"].tolist())
    outside = next(i for i in range(64) if i not in inside)
    model.model.norm.weight.data[outside] = torch.nextafter(
        model.model.norm.weight.data[outside], torch.tensor(2.0)
    )
    assert drifted(before, off_mask_sums(model)) == ["model.norm.weight"]
