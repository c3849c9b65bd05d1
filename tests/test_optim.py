"""SubnetAdamW: torch's arithmetic, small state, and its place in a Trainer."""

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from subnet_ft import SubnetAdamW, SubnetConfig, SubnetError
from subnet_ft.adapter.inject import sidecar_layers
from subnet_kernels import reference_adamw, small_state
from tests.helpers import (
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    snapshot,
    tiny_llama,
    tokens,
)
from tests.training_helpers import arguments, stock_trainer

SMALL = list(itertools.product([32, 8], ["fp32", "residual"]))


def masked(
    dtype: torch.dtype = torch.bfloat16, density: float = 0.1, **config: Any
) -> tuple[Any, list[torch.Tensor]]:
    model = tiny_llama(dtype)
    model = peft.get_peft_model(model, SubnetConfig(mask=random_mask(model, density), **config))
    return model, [p for p in model.parameters() if p.requires_grad]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 5, first: int = 0) -> float:
    for step in range(first, first + steps):
        ids = tokens(seed=step % 4)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_32_bit_is_torch_s_fused_adamw(dtype: torch.dtype, density: float) -> None:
    ours, our_values = masked(dtype, density)
    theirs, their_values = masked(dtype, density)
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1}
    train(ours, SubnetAdamW(our_values, **options))
    train(theirs, torch.optim.AdamW(their_values, fused=True, **options))
    for a, b in zip(our_values, their_values, strict=True):
        assert_same_bits(a, b)
    for name, weight in snapshot(ours).items():
        assert_same_bits(weight, snapshot(theirs)[name], name)


def test_defaults_are_adamw_s() -> None:
    parameter = [torch.nn.Parameter(torch.zeros(2))]
    ours, theirs = SubnetAdamW(parameter).defaults, torch.optim.AdamW(parameter).defaults
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize(("bits", "master"), SMALL)
def test_state_takes_the_bytes_it_should(bits: int, master: str) -> None:
    values_dtype = "bfloat16" if master == "residual" else "float32"
    model, values = masked(values_dtype=values_dtype)
    optimizer = SubnetAdamW(values, state_bits=bits, master=master)
    train(model, optimizer, steps=1)
    nnz = sum(v.numel() for v in values)
    state = sum(t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values())
    expected = (8 if bits == 32 else 2) + (master == "residual")
    assert state <= nnz * expected + len(values) * 4 * (1 + 2 * 2) + nnz * 8 / small_state.BLOCK
    assert sum(v.nbytes for v in values) == nnz * (2 if master == "residual" else 4)


@pytest.mark.parametrize(("bits", "master"), SMALL)
def test_small_state_follows_fp32_and_leaves_the_rest_alone(bits: int, master: str) -> None:
    values_dtype = "bfloat16" if master == "residual" else "float32"
    model, values = masked(density=0.3, values_dtype=values_dtype)
    exact, exact_values = masked(density=0.3)
    base = snapshot(tiny_llama(torch.bfloat16))
    loss = train(model, SubnetAdamW(values, lr=1e-2, state_bits=bits, master=master), 60)
    expected = train(exact, SubnetAdamW(exact_values, lr=1e-2), 60)
    start = train(*_untouched())
    assert start - expected > 0.5  # it does learn
    assert abs(loss - expected) < 0.1 * (start - expected)
    after = {
        name: weight
        for name, weight in snapshot(model.get_base_model()).items()
        if "subnet_ft" not in name
    }
    assert_off_mask_untouched(base, after, random_mask(tiny_llama(torch.bfloat16), 0.3))
    for layer in sidecar_layers(model):
        subnet = layer.subnets()[0]
        held = layer.weight.flatten()[subnet.indices]
        assert_same_bits(held, subnet.values.to(torch.bfloat16), layer.name)


def _untouched() -> tuple[Any, torch.optim.Optimizer, int]:
    model, values = masked(density=0.3)
    return model, torch.optim.SGD(values, lr=0.0), 4


@pytest.mark.parametrize(("bits", "master"), SMALL)
def test_resume_equals_never_having_stopped(bits: int, master: str) -> None:
    values_dtype = "bfloat16" if master == "residual" else "float32"

    def start() -> tuple[Any, list[torch.Tensor], SubnetAdamW]:
        model, values = masked(values_dtype=values_dtype)
        return model, values, SubnetAdamW(values, lr=1e-2, state_bits=bits, master=master)

    model, values, optimizer = start()
    train(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 4, first=4)
    resumed, resumed_values, resumed_optimizer = start()
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    train(resumed, resumed_optimizer, 4, first=4)
    for a, b in zip(values, resumed_values, strict=True):
        assert_same_bits(a, b)


def test_in_a_trainer(tmp_path: Path) -> None:
    def run(directory: Path, steps: int, resume: bool = False) -> Any:
        model, _ = masked(values_dtype="bfloat16")
        args = arguments(
            directory,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="constant",
        )
        trainer = stock_trainer(model, args)
        trainer.optimizer_cls_and_kwargs = (
            SubnetAdamW,
            {"lr": 1e-2, "state_bits": 8, "master": "residual"},
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 4)
    assert type(whole.optimizer.optimizer) is SubnetAdamW
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4, resume=True)
    for a, b in zip(snapshot(whole.model).values(), snapshot(resumed.model).values(), strict=True):
        assert_same_bits(a, b)


def test_bad_options_and_pairs_are_refused() -> None:
    parameter = [torch.nn.Parameter(torch.zeros(3))]
    for options in ({"state_bits": 4}, {"master": "fp16"}, {"lr": -1.0}, {"betas": (0.9, 1.0)}):
        with pytest.raises(SubnetError, match="expected"):
            SubnetAdamW(parameter, **options)
    model, values = masked(values_dtype="bfloat16")
    with pytest.raises(SubnetError, match='master="residual"'):
        train(model, torch.optim.AdamW(values), 1)
    model, values = masked()
    with pytest.raises(SubnetError, match="values_dtype"):
        train(model, SubnetAdamW(values, master="residual"), 1)
    with pytest.raises(SubnetError, match="expected a bf16 base"):
        masked(torch.float32, values_dtype="bfloat16")
    with pytest.raises(SubnetError, match="values_dtype: expected one of"):
        SubnetConfig(values_dtype="float16")


@pytest.mark.parametrize(("bits", "master"), SMALL[1:])
def test_stretches_do_not_show(bits: int, master: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small state is stepped some entries at a time: the same values, the same count of steps."""
    dtype = torch.bfloat16 if master == "residual" else torch.float32
    found = []
    for stretch in (1 << 17, 512):
        monkeypatch.setattr(reference_adamw, "STRETCH", stretch)
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(3000).to(dtype))
        optimizer = SubnetAdamW([parameter], lr=1e-2, state_bits=bits, master=master)
        for _ in range(3):
            parameter.grad = torch.randn(3000).to(dtype)
            optimizer.step()
        found.append([parameter.detach(), *optimizer.state[parameter].values()])
    assert optimizer.state[parameter]["step"] == 3
    for whole, stretched in zip(*found, strict=True):
        assert torch.equal(whole, stretched)
