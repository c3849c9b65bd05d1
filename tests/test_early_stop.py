"""Backward goes no deeper than the first masked layer."""

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from trl import SFTConfig, SFTTrainer

from subnet_ft import SubnetAdamW, SubnetConfig
from tests.helpers import assert_same_bits, tiny_llama, tokens
from tests.training_helpers import arguments, text_dataset, tiny_tokenizer

LAST_LAYER = r"model\.layers\.1\..*"


def last_layer_masked(**checkpointing: Any) -> Any:
    model: Any = tiny_llama()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
    return peft.get_peft_model(model, SubnetConfig(include=LAST_LAYER, density=0.1))


def watch(model: Any) -> list[bool]:
    """Note whether the first layer's output requires a gradient, each time it runs."""
    seen: list[bool] = []
    first = model.get_base_model().model.layers[0]
    first.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    return seen


def gradients(model: Any) -> list[torch.Tensor]:
    ids = tokens()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_the_first_layer_needs_none(when: str) -> None:
    model = last_layer_masked(**({"use_reentrant": False} if when == "before" else {}))
    if when == "after":
        model.get_base_model().activation_checkpointing_enable()
        model.enable_input_require_grads()
    seen = watch(model)
    found = gradients(model)
    assert seen and not any(seen)
    for one, expected in zip(found, gradients(last_layer_masked()), strict=True):
        assert_same_bits(one, expected)


def test_reentrant_checkpointing_still_gets_what_it_needs() -> None:
    model = last_layer_masked(use_reentrant=True)
    seen = watch(model)
    found = gradients(model)
    assert any(seen)
    for one, expected in zip(found, gradients(last_layer_masked()), strict=True):
        assert_same_bits(one, expected)


def test_a_masked_embedding_keeps_its_gradient() -> None:
    model: Any = tiny_llama(tied=False)
    config = SubnetConfig(include=r"model\.embed_tokens\.weight", density=0.1)
    model = peft.get_peft_model(model, config)
    model.get_base_model().activation_checkpointing_enable()
    (gradient,) = gradients(model)
    assert gradient.abs().sum() > 0


def test_other_uses_of_the_model_are_as_before() -> None:
    model = last_layer_masked(use_reentrant=False)
    twin = copy.deepcopy(model)
    seen = watch(twin)
    gradients(twin)
    assert not any(seen) and len(watch(model)) == 0
    base = model.unload()
    assert "enable_input_require_grads" not in base.__dict__
    out = base.model.embed_tokens(tokens())
    assert out.requires_grad  # as transformers wants it again
    base.disable_input_require_grads()
    assert not base.model.embed_tokens(tokens()).requires_grad


def test_under_trl(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path, SFTConfig, gradient_checkpointing=True, bf16=False, max_steps=2),
        train_dataset=text_dataset(),
        processing_class=tiny_tokenizer(),
        peft_config=SubnetConfig(include=LAST_LAYER, density=0.1),
    )
    trainer.optimizer_cls_and_kwargs = (SubnetAdamW, {"lr": 1e-2})
    seen = watch(trainer.model)
    trainer.train()
    assert seen and not any(seen)
    functions = {
        functools.partial(m._gradient_checkpointing_func).func
        for m in trainer.model.modules()
        if getattr(m, "gradient_checkpointing", False)
    }
    assert functions, "checkpointing was not on: nothing was tested"
