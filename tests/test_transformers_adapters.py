"""transformers' own adapter methods: add, load, set, disable, delete, save, from_pretrained."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from subnet_ft import SubnetConfig, SubnetError
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.checkpoints.adapter_mask import open_mask_or_adapter
from tests.helpers import (
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    snapshot,
    tiny_llama,
    tokens,
)
from tests.training_helpers import arguments, stock_trainer

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def added(dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    """A model whose adapter transformers added itself."""
    model = tiny_llama(dtype)
    model.add_adapter(SubnetConfig(mask=random_mask(model), **config))
    return model


def move(model: PreTrainedModel) -> None:
    """Give what is live values far from the base's."""
    for layer in sidecar_layers(model):
        for subnet in layer.live_subnets:
            subnet.values.data.add_(torch.randn_like(subnet.values))
        layer.flush()


def base_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in snapshot(model).items() if "subnet_ft_" not in name}


def assert_weights(model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> None:
    found = base_weights(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert_same_bits(weight, found[name], name)


@DTYPES
def test_every_verb_on_an_added_adapter(dtype: torch.dtype) -> None:
    base = snapshot(tiny_llama(dtype))
    model = added(dtype)
    assert_weights(model, base)
    move(model)
    first = base_weights(model)
    assert_off_mask_untouched(base, first, random_mask(tiny_llama(dtype)))
    model.disable_adapters()
    assert_weights(model, base)
    model.enable_adapters()
    assert_weights(model, first)
    model.add_adapter(SubnetConfig(mask=random_mask(tiny_llama(), 0.2, seed=1)), "other")
    assert model.active_adapters() == ["other"]
    assert_weights(model, base)
    move(model)
    other = base_weights(model)
    model.set_adapter("default")
    assert_weights(model, first)
    model.set_adapter("other")
    assert_weights(model, other)
    model.delete_adapter("other")
    assert_weights(model, first)
    model.delete_adapter("default")
    assert_weights(model, base)
    assert not list(sidecar_layers(model)) and type(model.lm_head) is torch.nn.Linear
    model.add_adapter(SubnetConfig(density=0.5))
    assert {p.requires_grad for p in base_weights(model).values()} == {False}
    model(tokens(), labels=tokens()).loss.backward()
    assert all(layer.subnets()[0].values.grad is not None for layer in sidecar_layers(model))


def test_nothing_is_refused_once_the_last_is_deleted() -> None:
    model = added()
    model.delete_adapter("default")
    model.resize_token_embeddings(128)
    assert model.half()(tokens()).logits.shape[-1] == 128


@DTYPES
def test_load_adapter_takes_the_entries_from_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = peft.get_peft_model(tiny_llama(dtype), SubnetConfig(mask=random_mask(tiny_llama())))
    move(saved.get_base_model())
    saved.save_pretrained(tmp_path)
    expected, base = base_weights(saved.get_base_model()), snapshot(tiny_llama(dtype))
    model = tiny_llama(dtype)
    model.load_adapter(str(tmp_path))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert_weights(model, expected)
    model.disable_adapters()
    assert_weights(model, base)
    model.enable_adapters()
    model.load_adapter(str(tmp_path), "again", is_trainable=True)
    assert model.active_adapters() == ["again"]
    assert_weights(model, expected)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".again." in name for name in trainable)
    model.set_adapter("default")
    assert_weights(model, expected)
    model.delete_adapter(["default", "again"])
    assert_weights(model, base)


def test_a_state_dict_in_place_of_a_file(tmp_path: Path) -> None:
    saved = added()
    move(saved)
    saved.save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(
        peft_config=peft.PeftConfig.from_pretrained(tmp_path),
        adapter_state_dict=load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert_weights(model, base_weights(saved))


def test_what_transformers_saves_peft_loads_and_extraction_reads(tmp_path: Path) -> None:
    model = added()
    move(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_weights(loaded.get_base_model(), base_weights(model))
    assert open_mask_or_adapter(tmp_path) == random_mask(tiny_llama())


def test_from_pretrained_of_an_adapter_directory(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    saved = peft.get_peft_model(base, SubnetConfig(mask=random_mask(base)))
    move(base)
    saved.save_pretrained(tmp_path / "adapter")
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        model, info = cls.from_pretrained(tmp_path / "adapter", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_weights(model, base_weights(base))
        assert_same_bits(model(tokens()).logits, base.eval()(tokens()).logits)


def test_modules_to_save(tmp_path: Path) -> None:
    def build() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        config = tiny_llama().config
        config.num_labels = 3
        return LlamaForSequenceClassification(config)

    saved = peft.get_peft_model(
        build(), SubnetConfig(density=0.1, modules_to_save=["score"], task_type="SEQ_CLS")
    )
    optimizer = torch.optim.AdamW([p for p in saved.parameters() if p.requires_grad], lr=0.05)
    saved(tokens(), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    saved.save_pretrained(tmp_path)
    model = build()
    model.load_adapter(str(tmp_path))
    assert_same_bits(model(tokens()).logits, saved.eval()(tokens()).logits)


def test_training_what_was_added(tmp_path: Path) -> None:
    """A model without a PeftModel around it, in the plain Trainer."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = stock_trainer(added(), arguments(tmp_path / "whole", max_steps=4, **saving))
    whole.train()
    base = snapshot(tiny_llama())
    trained = base_weights(whole.model)
    assert_off_mask_untouched(base, trained, random_mask(tiny_llama()))
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    loaded = tiny_llama()
    loaded.load_adapter(checkpoint)
    assert_weights(loaded, trained)


def test_a_file_of_another_base_is_refused_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    saved = added()
    move(saved)
    saved.save_pretrained(tmp_path)
    model = tiny_llama(seed=1)
    before, logits = snapshot(model), model(tokens()).logits
    with pytest.raises(SubnetError, match="wrong base model") as error:
        model.load_adapter(str(tmp_path))
    assert "\n" not in str(error.value)
    assert_weights(model, before)
    assert_same_bits(model(tokens()).logits, logits)
    model.add_adapter(SubnetConfig(density=0.1))
    assert_same_bits(model(tokens()).logits, logits)


def test_adapters_of_other_types_load_as_ever(tmp_path: Path) -> None:
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_llama(), lora).save_pretrained(tmp_path)
    alone = tiny_llama()
    alone.load_adapter(str(tmp_path))
    model = added()
    model.delete_adapter("default")
    model.load_adapter(str(tmp_path))
    assert_same_bits(model.eval()(tokens()).logits, alone(tokens()).logits)
