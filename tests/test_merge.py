import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import ConfigError, MaskMismatchError
from subnet_ft.merge import merge_checkpoint
from tests.checkpoint_helpers import FORMS, save_directory, save_subnet_adapter, tiny_llama


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def subnet(model, path: Path) -> dict[str, torch.Tensor]:
    """Write an adapter with random values, and return the merged weights."""
    merged, changes = {}, {}
    for name, weight in parameters(model).items():
        merged[name] = weight.clone()
        if "k_proj" in name:
            continue
        indices = (torch.rand(weight.numel()) < 0.2).nonzero().view(-1)
        # Halfway between two bf16 values: rounding must be to nearest even.
        halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
        values = torch.where(
            torch.rand(len(indices)) < 0.5,
            halves[torch.randint(3, (len(indices),))],
            torch.randn(len(indices)),
        )
        changes[name] = (indices, values)
        merged[name].view(-1)[indices] = values.to(weight.dtype)
    save_subnet_adapter(path, parameters(model), changes)
    return merged


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_merged_directory_loads_with_the_expected_bits(form, dtype, tied, tmp_path, monkeypatch):
    monkeypatch.setattr("subnet_ft.merge._CHUNK", 100)
    model = tiny_llama(tied, dtype)
    base = FORMS[form](model, tmp_path / "base")
    expected = subnet(model, tmp_path / "adapter")
    summary = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    found = parameters(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert summary.parameters == len(expected)
    assert summary.changed_parameters == len(expected) - 2
    assert summary.bytes == sum(
        tensor.nbytes
        for file in (tmp_path / "merged").glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}


def test_files_are_the_bases_own(tmp_path: Path):
    model = tiny_llama()
    base = FORMS["sharded"](model, tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "optimizer.pt").write_text("")
    (base / "trainer_state.json").write_text("{}")
    subnet(model, tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    left_behind = {"optimizer.pt", "trainer_state.json"}
    names = {path.name for path in base.iterdir()} - left_behind
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    index = "model.safetensors.index.json"
    maps = [
        json.loads((tmp_path / s / index).read_text())["weight_map"] for s in ("base", "merged")
    ]
    assert maps[0] == maps[1]


def test_stored_copy_of_a_tied_head_stays_tied(tmp_path: Path):
    model = tiny_llama()
    base = FORMS["tied head stored"](model, tmp_path / "base")
    expected = subnet(model, tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert torch.equal(written["model.position_ids"], torch.arange(7))


@pytest.mark.filterwarnings("ignore")
def test_lora_merges_as_in_memory(tmp_path: Path):
    base = save_directory(tiny_llama(), tmp_path / "base")
    adapted = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    expected = parameters(adapted.merge_and_unload())
    merge_checkpoint(base, tmp_path / "lora", tmp_path / "merged")
    checkpoint = open_checkpoint(tmp_path / "merged")
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor.reshape(-1)), name


def test_what_is_refused_leaves_nothing(tmp_path: Path):
    model = tiny_llama()
    base = save_directory(model, tmp_path / "base")
    subnet(model, tmp_path / "adapter")
    other = save_directory(tiny_llama(seed=5), tmp_path / "other")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match="does not exist"):
        merge_checkpoint(base, tmp_path / "adapter", other)
    with pytest.raises(ConfigError, match="expected an adapter directory"):
        merge_checkpoint(base, other, tmp_path / "merged")
    with pytest.raises(MaskMismatchError, match="other base values"):
        merge_checkpoint(other, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
