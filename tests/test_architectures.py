"""Every kind of model: extract, train, save, load and merge, to the bit, any parameter masked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t

from subnet_ft import SubnetAdamW, SubnetConfig, SubnetMask, extract_mask
from subnet_ft.merge import merge_checkpoint
from tests.helpers import assert_off_mask_untouched, assert_same_bits, snapshot, tokens

SIZE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8}
IMAGE = 95  # the token an image stands for


def gemma3_vision() -> Any:
    text = {**SIZE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    return t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**text),
        vision_config={
            **VISION,
            "patch_size": 2,
            "num_attention_heads": 2,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=93,
        eoi_token_index=94,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZE, tie_word_embeddings=False)),
    "qwen3 tied": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZE, tie_word_embeddings=True)),
    "qwen3 moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZE, **EXPERTS, num_experts=4)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZE, num_local_experts=4)),
    "gemma 3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZE)),
    "gpt-2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    ),
    "gemma 3 vision": lambda: t.Gemma3ForConditionalGeneration(gemma3_vision()),
    "mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2)
    ),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # some start as zeros, where no gradient passes
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    ids = tokens(vocab=90)
    inputs = {"input_ids": ids, "labels": ids}
    if model.config.model_type == "gemma3":
        ids[:, 1:5] = IMAGE
        pixels = torch.randn(len(ids), 3, 8, 8, generator=torch.Generator().manual_seed(0))
        inputs |= {"pixel_values": pixels.bfloat16(), "token_type_ids": (ids == IMAGE).long()}
    return inputs


def train(model: Any, steps: int = 5) -> None:
    optimizer = SubnetAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**inputs_of(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def move_some(model: Any) -> None:
    """Move every third entry of every parameter by a step that bf16 shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::3] += 0.25


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    base = build(name)
    parameters = snapshot(base)
    base.save_pretrained(tmp_path / "base")
    move_some(base)
    base.save_pretrained(tmp_path / "tuned")
    mask = extract_mask(tmp_path / "base", tmp_path / "tuned", progress=False)
    mask.save(tmp_path / "mask.safetensors")
    assert set(mask) == set(parameters), "every parameter of the model, under its own name"
    for key, weight in parameters.items():
        assert mask[key].tolist() == list(range(0, weight.numel(), 3)), key

    def load(path: str) -> Any:
        return type(base).from_pretrained(tmp_path / path, dtype=torch.bfloat16).eval()

    config = SubnetConfig(mask=SubnetMask.load(tmp_path / "mask.safetensors"))
    model = peft.get_peft_model(load("base"), config)
    assert_same_bits(model(**inputs_of(model)).loss, load("base")(**inputs_of(model)).loss)
    train(model)
    trained = {
        key: weight
        for key, weight in snapshot(model.get_base_model()).items()
        if "subnet_ft_" not in key
    }
    assert trained.keys() == parameters.keys()
    assert_off_mask_untouched(parameters, trained, mask)
    still = [key for key in parameters if torch.equal(parameters[key], trained[key])]
    assert not still, "every parameter trains"
    model.save_pretrained(tmp_path / "adapter")

    loaded = peft.PeftModel.from_pretrained(load("base"), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    for found in (loaded.get_base_model(), load("merged"), model.merge_and_unload()):
        weights = snapshot(found)
        for key, weight in trained.items():
            assert_same_bits(weights[key], weight, key)
