import json
import math
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.errors import (
    CheckpointError,
    MaskFormatError,
    MaskMismatchError,
    SubnetError,
    UnsupportedError,
)
from subnet_ft.storage.arrays import to_tensor
from tests.checkpoint_helpers import (
    FORMS,
    save_bin,
    save_directory,
    save_sharded,
    save_subnet_adapter,
    save_weights,
    save_with_tied_head,
    tiny_llama,
)


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read every parameter in slices of a size that divides nothing."""
    tensors = {}
    for name, info in checkpoint.tensors.items():
        parts = [
            checkpoint.read(name, i, min(i + 37, info.numel)) for i in range(0, info.numel, 37)
        ]
        tensors[name] = torch.cat(parts).view(info.shape)
    return tensors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_named_parameters(form: str, tied: bool, tmp_path: Path):
    model = tiny_llama(tied)
    checkpoint = open_checkpoint(FORMS[form](model, tmp_path / "model"))
    found = read_all(checkpoint)
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_buffers_are_reported_not_dropped(tmp_path: Path):
    checkpoint = open_checkpoint(save_with_tied_head(tiny_llama(), tmp_path / "model"))
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert checkpoint.skipped == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "a buffer the model computes",
        "model.position_ids": "a buffer of dtype int64",
    }


def test_tied_in_text_config_and_by_storage(tmp_path: Path):
    weight = torch.randn(6, 4)
    weights = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()}
    nested = save_weights(tmp_path / "a", weights, text_config={"tie_word_embeddings": True})
    assert set(open_checkpoint(nested).tensors) == {"model.embed_tokens.weight"}
    apart = save_weights(tmp_path / "b", weights, tie_word_embeddings=False)
    assert set(open_checkpoint(apart).tensors) == set(weights)
    (tmp_path / "c").mkdir()
    shared = {"transformer.wte.weight": weight, "lm_head.weight": weight}
    torch.save(shared, tmp_path / "c" / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path / "c").tensors) == {"transformer.wte.weight"}
    (tmp_path / "d").mkdir()
    three = {"shared.weight": weight, "encoder.weight": weight, "decoder.weight": weight}
    torch.save(three, tmp_path / "d" / "pytorch_model.bin")
    assert open_checkpoint(tmp_path / "d").aliases == {
        "encoder.weight": "shared.weight",
        "decoder.weight": "shared.weight",
    }


def test_reads_into_the_given_memory(tmp_path: Path):
    model = tiny_llama()
    for form in ("directory", "bin"):
        checkpoint = open_checkpoint(FORMS[form](model, tmp_path / form))
        memory = np.empty(50, np.uint16)
        read = checkpoint.read_array("model.norm.weight", 4, 32, out=memory)
        assert read.base is memory
        assert torch.equal(to_tensor(read, "bfloat16"), model.model.norm.weight[4:32])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def broken(kind: str, folder: Path) -> Path:
    """Make a model directory with one fault."""
    model = tiny_llama()
    if kind == "absent":
        return folder
    if kind == "empty":
        folder.mkdir()
        return folder
    if kind in ("missing shard", "truncated shard", "foreign shard", "index disagrees"):
        save_sharded(model, folder)
        shard = next(folder.glob("model-00002-of-*"))
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        if kind == "missing shard":
            shard.unlink()
        elif kind == "truncated shard":
            truncate(shard)
        elif kind == "foreign shard":
            content["weight_map"]["model.norm.weight"] = "../other.safetensors"
        else:
            content["weight_map"]["model.absent.weight"] = shard.name
        index.write_text(json.dumps(content))
        return folder
    if kind == "pickle":
        folder.mkdir()
        torch.save({"w": Exception("anything")}, folder / "pytorch_model.bin")
        return folder
    if kind == "no dictionary":
        folder.mkdir()
        torch.save([torch.ones(2)], folder / "pytorch_model.bin")
        return folder
    if kind == "bad config":
        save_directory(model, folder)
        (folder / "config.json").write_text("{")
        return folder
    if kind == "quantized config":
        return save_weights(folder, {"w": torch.ones(2)}, quantization_config={"bits": 4})
    tensors = {
        "integers": {"w.weight": torch.ones(2, dtype=torch.int8)},
        "float8": {"w.weight": torch.ones(2).to(torch.float8_e4m3fn)},
        "gptq": {"w.qweight": torch.ones(2, dtype=torch.int32)},
        "missing expert": {"model.layers.0.mlp.experts.3.w1.weight": torch.ones(2, 2)},
        "unknown expert": {"model.layers.0.mlp.experts.0.w9.weight": torch.ones(2, 2)},
        "only buffers": {"model.inv_freq": torch.ones(2)},
    }
    return save_weights(folder, tensors[kind])


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("absent", CheckpointError, "no such path"),
        ("empty", CheckpointError, "expected one of model.safetensors"),
        ("missing shard", CheckpointError, "model-00002-of-.*expected this shard"),
        ("truncated shard", CheckpointError, "model-00002-of-.*expected a complete safetensors"),
        ("foreign shard", CheckpointError, "expected shard file names"),
        ("index disagrees", CheckpointError, "model.absent.weight must be in"),
        ("pickle", CheckpointError, "tensors only"),
        ("no dictionary", CheckpointError, "expected a dictionary of tensors"),
        ("bad config", CheckpointError, "config.json: expected JSON"),
        ("quantized config", UnsupportedError, "quantization_config"),
        ("integers", UnsupportedError, "w.weight: expected float32.*got int8"),
        ("float8", UnsupportedError, "w.weight: expected float32.*got F8_E4M3"),
        ("gptq", UnsupportedError, "w.qweight: .*quantized layout"),
        ("missing expert", CheckpointError, "experts.gate_up_proj: expected experts 0 to 3"),
        ("unknown expert", UnsupportedError, "found w9.weight .*layout is not known"),
        ("only buffers", CheckpointError, "expected floating-point parameters, found none"),
    ],
)
def test_broken_checkpoints(kind: str, error: type[SubnetError], message: str, tmp_path: Path):
    with pytest.raises(error, match=message) as raised:
        open_checkpoint(broken(kind, tmp_path / "model"))
    assert "\n" not in str(raised.value)


def test_pickles_are_never_executed(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    torch.save({"w": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


LORA = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 3, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 7},
    },
    "modules_to_save": {"target_modules": ["v_proj"], "modules_to_save": ["norm", "gate_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
}


def trained_lora(model, options: dict, folder: Path) -> None:
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, **options}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", LORA)
def test_lora_overlay_has_the_bits_of_peft(kind: str, dtype: torch.dtype, tmp_path: Path):
    base = save_directory(tiny_llama(dtype=dtype), tmp_path / "base")
    trained_lora(tiny_llama(dtype=dtype), LORA[kind], tmp_path / "lora")
    merged = peft.PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path / "lora")
    expected = dict(merged.merge_and_unload().named_parameters())
    found = read_all(open_checkpoint(tmp_path / "lora", base=base))
    changed = [n for n, p in tiny_llama(dtype=dtype).named_parameters() if (found[n] != p).any()]
    assert changed and found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.filterwarnings("ignore")
def test_lora_on_transposed_weights(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))

    gpt2().save_pretrained(tmp_path / "base")
    trained_lora(gpt2(), {"target_modules": ["c_attn", "c_fc"]}, tmp_path / "lora")
    merged = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "lora").merge_and_unload()
    found = read_all(open_checkpoint(tmp_path / "lora", base=tmp_path / "base"))
    for name, parameter in merged.named_parameters():
        assert torch.equal(found[name], parameter), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"use_dora": True}, UnsupportedError, "use_dora=True"),
        ({"bias": "all"}, UnsupportedError, "bias='all'"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, UnsupportedError, "found LOHA"),
        ({"r": 5}, CheckpointError, "factors of rank 5"),
        ({"base_model_name_or_path": None}, CheckpointError, "names none; pass the base"),
    ],
)
def test_adapters_that_are_refused(change: dict, error, message: str, tmp_path: Path):
    base = save_directory(tiny_llama(), tmp_path / "base")
    trained_lora(tiny_llama(), LORA["plain"], tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    over = None if "base_model_name_or_path" in change else base
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path / "lora", base=over)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        "model.up.weight": torch.randn(30, 7).bfloat16(),
        "model.up.bias": torch.randn(30).bfloat16(),
        "model.experts.gate_up": torch.randn(2, 3, 5).bfloat16(),
    }


def changes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    chosen = {}
    for name, density in zip(weights, (0.02, 0.5, 1.0), strict=True):
        numel = weights[name].numel()
        indices = torch.randperm(numel)[: math.ceil(density * numel)].sort().values
        chosen[name] = (indices, torch.randn(len(indices)))
    return chosen


def test_subnet_overlay(weights: dict[str, torch.Tensor], tmp_path: Path):
    base = save_weights(tmp_path / "base", weights)
    moved = changes(weights)
    adapter = save_subnet_adapter(tmp_path / "adapter", weights, moved, base_model=str(base))
    found = read_all(open_checkpoint(adapter))
    for name, (indices, values) in moved.items():
        expected = weights[name].clone()
        expected.view(-1)[indices] = values.bfloat16()
        assert torch.equal(found[name], expected)


def test_subnet_overlay_over_an_edited_base(weights: dict[str, torch.Tensor], tmp_path: Path):
    moved = changes(weights)
    adapter = save_subnet_adapter(tmp_path / "adapter", weights, moved)
    covered = int(moved["model.up.weight"][0][1])
    edited = {name: weight.clone() for name, weight in weights.items()}
    edited["model.up.weight"].view(-1)[covered - 1 if covered - 1 not in moved else 0] += 1
    edited["model.up.weight"].view(-1)[covered] += 1
    base = save_weights(tmp_path / "base", edited)
    overlay = open_checkpoint(adapter, base=base)
    with pytest.raises(MaskMismatchError, match=r"model.up.weight: .*other base values"):
        overlay.read("model.up.weight", 0, 8)
    other = save_weights(tmp_path / "other", {"model.up.weight": torch.ones(3)})
    with pytest.raises(MaskMismatchError, match="made for shape"):
        open_checkpoint(adapter, base=other)


@pytest.mark.parametrize("lost", ["header", "values", "bitmap"])
def test_subnet_adapter_that_lost_a_tensor(lost: str, weights, tmp_path: Path):
    base = save_weights(tmp_path / "base", weights)
    adapter = save_subnet_adapter(tmp_path / "adapter", weights, changes(weights))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    suffix = {"header": "subnet_ft_header", "values": "values.weight", "bitmap": ".bitmap"}[lost]
    tensors.pop(next(key for key in tensors if key.endswith(suffix)))
    save_file(tensors, path)
    with pytest.raises(MaskFormatError, match="save the adapter again"):
        open_checkpoint(adapter, base=base)


def test_adapter_beside_model_weights_wins(weights: dict[str, torch.Tensor], tmp_path: Path):
    """A Trainer checkpoint of a callback holds both; the adapter is what was trained."""
    base = save_weights(tmp_path / "base", weights)
    adapter = save_subnet_adapter(tmp_path / "adapter", weights, changes(weights))
    shutil.copy(base / "model.safetensors", adapter / "model.safetensors")
    assert open_checkpoint(adapter, base=base).path == adapter


def test_hub_ids_that_cannot_be_had(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: .*check the name and the network"):
        open_checkpoint("nobody/nothing")


def test_hub_download_is_opened(tmp_path: Path, monkeypatch):
    import huggingface_hub

    folder = save_bin(tiny_llama(), tmp_path / "snapshot")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns[0], ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("owner/name").source == "owner/name"
    assert asked == [("owner/name", kind, ["*/*"]) for kind in ("*.safetensors", "*.bin")]


def test_a_stored_head_that_differs_is_a_parameter_of_its_own(tmp_path: Path):
    """Transformers 5 does not tie it either, whatever the config says."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    embedding = model.get_input_embeddings().weight.detach()
    weights = load_file(tmp_path / "model.safetensors")
    for head, alias in ((embedding.clone(), True), (embedding + 1, False)):
        save_file(
            {**weights, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        checkpoint = open_checkpoint(tmp_path)
        assert ("lm_head.weight" in checkpoint.aliases) == alias
        assert ("lm_head.weight" in checkpoint.tensors) != alias
