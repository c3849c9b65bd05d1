"""SubnetDiscoveryCallback: which mask it finds, what moves, what is stored, and resuming."""

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from subnet_ft import SubnetAdamW, SubnetCallback, SubnetDiscoveryCallback, SubnetMask
from subnet_ft.adapter.drift import off_mask_sums
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.errors import ConfigError, MaskMismatchError
from subnet_ft.selectors import largest_entries
from subnet_ft.sign_sgd import SignSGD
from tests.helpers import assert_off_mask_untouched, assert_same_bits, snapshot, tiny_llama
from tests.training_helpers import arguments, stock_trainer, text_dataset, tiny_tokenizer

KEEP, RATE = 0.1, 2e-3


def test_largest_entries_and_ties() -> None:
    scores = torch.tensor([[1.0, -3.0, 0.0], [3.0, -1.0, 2.0]])
    assert largest_entries(scores, 1).tolist() == [1]
    assert largest_entries(scores, 3).tolist() == [1, 3, 5]
    assert largest_entries(scores, 4).tolist() == [0, 1, 3, 5]
    assert largest_entries(torch.zeros(7), 3).tolist() == [0, 1, 2]
    noise = torch.randn(999).bfloat16()
    expected = noise.float().abs().argsort(descending=True, stable=True)[:99]
    assert torch.equal(largest_entries(noise, 99), expected.sort().values)


def sft_trainer(model: Any, args: Any, callbacks: list[TrainerCallback]) -> SFTTrainer:
    args = arguments(Path(args.output_dir), SFTConfig, max_steps=args.max_steps, bf16=False)
    return SFTTrainer(
        model,
        args=args,
        train_dataset=text_dataset(),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


class Watch(TrainerCallback):
    """What the optimizer and the model hold after each step."""

    def __init__(self) -> None:
        self.states: list[int] = []
        self.gradients: list[bool] = []
        self.groups: list[list[int]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs) -> None:
        self.states.append(len(optimizer.state))
        self.gradients.append(any(p.grad is not None for p in model.parameters()))
        self.groups.append([id(p) for group in optimizer.param_groups for p in group["params"]])

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.weights.append({n: w for n, w in snapshot(model).items() if "subnet_ft" not in n})


@pytest.mark.parametrize("make", [stock_trainer, sft_trainer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_choose_the_mask_and_the_rest_trains_it_alone(
    make: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, watch = tiny_llama(dtype), Watch()
    base = snapshot(model)
    callback = SubnetDiscoveryCallback(3, keep=KEEP, learning_rate=RATE)
    trainer = make(model, arguments(tmp_path, max_steps=5), [callback, watch])
    batches: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, __, kw: batches.append(dict(kw)), with_kwargs=True)
    trainer.train()
    mask = SubnetMask.load(tmp_path / "mask.safetensors")
    assert set(mask) == {n for n in base if "_proj.weight" in n}

    dense = tiny_llama(dtype)  # the same batches, in full
    votes = {name: torch.zeros(base[name].shape) for name in mask}
    for batch in batches[:3]:
        dense(**batch).loss.backward()
        for name in mask:
            weight = dense.get_parameter(name)
            votes[name] += weight.grad.sign().float()
            weight.data.copy_(base[name].float() - RATE * votes[name])
        dense.zero_grad()
        if batch is batches[1]:
            for name in mask:
                assert_same_bits(watch.weights[1][name], dense.get_parameter(name).data, name)
    switched = watch.weights[2]
    assert_off_mask_untouched(base, switched, mask)
    for name in mask:
        assert len(mask[name]) == round(KEEP * base[name].numel())
        chosen = mask[name].long()
        far = votes[name].abs().flatten()
        rest = torch.ones(far.numel(), dtype=torch.bool).index_fill(0, chosen, False)
        assert far[chosen].min() >= far[rest].max()
        kept, moved = switched[name].flatten()[chosen], dense.get_parameter(name).flatten()[chosen]
        assert_same_bits(kept, moved.detach(), name)

    trained = watch.weights[-1]
    assert_off_mask_untouched(base, trained, mask)
    assert all((trained[name] != switched[name]).any() for name in mask)
    assert watch.states == [0, 0, 0, len(mask), len(mask)]
    assert watch.gradients == [False, False, False, True, True]
    assert watch.groups.count(watch.groups[0]) == 5 and len(watch.groups[0]) == len(mask)
    assert not callback.discovering and not callback._moving


def test_votes_saturate_and_ties_are_drawn() -> None:
    weight = torch.zeros(2, 500, dtype=torch.bfloat16)
    sgd = SignSGD(weight, 2.0**-12)
    signs = torch.tensor([[1.0], [-1.0]]).expand_as(weight)
    for _ in range(130):
        sgd.count(signs * 1e-20)
    assert sgd.votes[0].eq(127).all() and sgd.votes[1].eq(-127).all() and sgd.finite()
    sgd.count(-signs)
    sgd.move()
    assert weight[0].eq(-126 * 2.0**-12).all() and weight[1].eq(126 * 2.0**-12).all()
    chosen = sgd.furthest(100, torch.Generator().manual_seed(0))
    assert 30 < (chosen < 500).sum() < 70
    assert sgd.drift(chosen[:1]).tolist() == [-126 * 2.0**-12]
    sgd.undo()
    assert not weight.any()
    sgd.count(torch.full_like(weight, float("inf")))
    assert not sgd.finite()


def test_logs_show_what_is_stored(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    targeted = sum(p.nbytes for n, p in model.named_parameters() if "_proj.weight" in n)
    weights = sum(p.nbytes for p in model.parameters())
    trainer = stock_trainer(
        model, arguments(tmp_path, max_steps=4), [SubnetDiscoveryCallback(0.5, keep=KEEP)]
    )
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history[:4]}
    before, after = (
        {
            key.removeprefix(f"subnet_bytes_{phase}_"): value
            for key, value in logs[step].items()
            if key.startswith("subnet_bytes")
        }
        for step, phase in ((2, "discovery"), (3, "masked"))
    )
    assert before["kept"] == targeted * 3 // 2 and before["optimizer"] == before["gradients"] == 0
    nnz = sum(s.indices.numel() for la in sidecar_layers(model) for s in la.subnets())
    assert after["kept"] == 0 and after["gradients"] == 4 * nnz
    assert 8 * nnz <= after["optimizer"] < 8 * nnz + 1000
    assert weights + 14 * nnz <= before["weights"] == after["weights"] < weights + 14 * nnz + 1000
    assert "subnet_bytes_discovery_kept" not in logs[1] | logs[4]
    assert "subnet_flipped" not in logs[1] and logs[4]["subnet_flipped"] > 0


def test_resuming_equals_never_having_stopped(tmp_path: Path) -> None:
    def run(name: str, resume: bool = False) -> dict[str, torch.Tensor]:
        model = tiny_llama(torch.bfloat16)
        args = arguments(tmp_path / name, max_steps=6, save_strategy="steps", save_steps=4)
        trainer = stock_trainer(model, args, [SubnetDiscoveryCallback(2, keep=KEEP)])
        trainer.train(
            resume_from_checkpoint=str(tmp_path / name / "checkpoint-4") if resume else None
        )
        return snapshot(model)

    whole, resumed = run("run"), run("run", resume=True)
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert_same_bits(weight, resumed[name], name)

    file = tmp_path / "run" / "mask.safetensors"
    mask = SubnetMask.load(file)
    others = {name: (mask[name] + 1)[:-1] for name in mask}
    others = {n: torch.cat([torch.tensor([0]), i]).unique() for n, i in others.items()}
    kept = file.read_bytes()
    SubnetMask(others, mask.shapes).save(file, overwrite=True)
    with pytest.raises((ConfigError, MaskMismatchError), match="mask"):
        run("run", resume=True)
    file.unlink()
    with pytest.raises(ConfigError, match="the mask this run found"):
        run("run", resume=True)
    file.write_bytes(kept)
    again = stock_trainer(
        tiny_llama(torch.bfloat16),
        arguments(tmp_path / "run", max_steps=6),
        [SubnetCallback(file)],  # which resumes it as well
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, weight in snapshot(again.model).items():
        assert_same_bits(weight, whole[name], name)


def test_no_checkpoint_before_the_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.WARNING, "subnet_ft"):
        stock_trainer(tiny_llama(), args, [SubnetDiscoveryCallback(2)]).train()
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (2, 3, 4)}
    assert caplog.text.count("no checkpoint at step 1: the mask is not known before step 2") == 1
    adapter = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-2")
    mask = SubnetMask.load(tmp_path / "mask.safetensors")
    saved = snapshot(adapter.get_base_model())
    assert_off_mask_untouched(snapshot(tiny_llama()), saved, mask)


def test_a_run_ended_too_soon_leaves_the_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True
            return control

    model = tiny_llama()
    trainer = stock_trainer(model, arguments(tmp_path), [SubnetDiscoveryCallback(3), Stop()])
    trainer.train()
    assert trainer.state.global_step == 1 and "ended before a mask was found" in caplog.text
    for name, weight in snapshot(tiny_llama()).items():
        assert_same_bits(weight, model.get_parameter(name).detach(), name)


def test_accumulated_compact_and_bf16(tmp_path: Path) -> None:
    """Gradient accumulation, layers that never hold a dense gradient after it, small state."""
    model = tiny_llama(torch.bfloat16)
    base = snapshot(model)
    callback = SubnetDiscoveryCallback(
        1, keep=KEEP, weight_grad="compact", values_dtype="bfloat16", exclude=".*k_proj.*"
    )
    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2)
    trainer = stock_trainer(model, args, [callback])
    trainer.optimizer_cls_and_kwargs = (
        SubnetAdamW,
        {"lr": 1e-2, "master": "residual", "state_bits": 8, "release_gradients": False},
    )
    trainer.train()
    mask = SubnetMask.load(tmp_path / "mask.safetensors")
    assert not any("k_proj" in name for name in mask.shapes)
    trained = {n: w for n, w in snapshot(model).items() if n in base}
    assert_off_mask_untouched(base, trained, mask)
    assert all((trained[name] != base[name]).any() for name in mask)
    assert off_mask_sums(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubnetDiscoveryCallback(0), "a number of steps, or a share"),
        (lambda: SubnetDiscoveryCallback(2.5), "a number of steps, or a share"),
        (lambda: SubnetDiscoveryCallback(2, keep=2), "density: expected a share"),
        (lambda: SubnetDiscoveryCallback(2, learning_rate=0), "learning_rate: expected"),
        (lambda: SubnetDiscoveryCallback(2, mask="m"), "to find a mask itself"),
        (lambda: SubnetDiscoveryCallback(2, include="nothing"), "nothing"),
    ],
)
def test_bad_options(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        stock_trainer(tiny_llama(), arguments(tmp_path), [make()])


def test_what_gives_no_gradients_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for field, value in (("fp16", True), ("torch_compile", True)):
        model = tiny_llama()
        trainer_args = arguments(tmp_path)
        setattr(trainer_args, field, value)
        with pytest.raises(ConfigError, match=f"own gradients, found {field}"):
            SubnetDiscoveryCallback(2).on_init_end(trainer_args, None, None, model=model)
        assert not list(sidecar_layers(model))
    with pytest.raises(ConfigError, match="expected a run longer than the 4 steps"):
        stock_trainer(tiny_llama(), args, [SubnetDiscoveryCallback(4)]).train()
    trainer = stock_trainer(tiny_llama(), args, [SubnetDiscoveryCallback(2)])
    trainer.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ConfigError, match="expected finite gradients"):
        trainer.train()
