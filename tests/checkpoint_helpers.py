"""Tiny real models saved in every form a checkpoint may have, and the paper's counts of them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(tied: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def tuned_from(model: LlamaForCausalLM, density: float = 0.3, seed: int = 1) -> LlamaForCausalLM:
    """A copy with some weights moved, by steps from below the paper's tolerance to above it."""
    tuned = type(model)(model.config).to(model.dtype)
    tuned.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            moved = torch.rand(parameter.shape, generator=generator) < density
            size = 10 ** (-7 + 4 * torch.rand(parameter.shape, generator=generator))
            parameter += (moved * size).to(parameter.dtype)
    return tuned


def paper_counts(base: LlamaForCausalLM, tuned: LlamaForCausalLM) -> tuple[int, int, int]:
    """(changed exactly, changed beyond 1e-5, all): the paper's script, read independently."""
    exact = close = total = 0
    others = dict(tuned.to(torch.bfloat16).named_parameters())
    for name, parameter in base.to(torch.bfloat16).named_parameters():
        delta = (others[name] - parameter).detach()
        exact += int((delta != 0).sum())
        close += int((~torch.isclose(delta, torch.zeros_like(delta), atol=1e-5)).sum())
        total += delta.numel()
    return exact, close, total


def save_directory(model: LlamaForCausalLM, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def save_sharded(model: LlamaForCausalLM, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def save_bin(model: LlamaForCausalLM, path: Path) -> Path:
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    return path


def save_sharded_bin(model: LlamaForCausalLM, path: Path) -> Path:
    model.config.save_pretrained(path)
    weights = list(model.state_dict().items())
    shards = {"pytorch_model-00001-of-00002.bin": weights[:5],
              "pytorch_model-00002-of-00002.bin": weights[5:]}  # fmt: skip
    for name, part in shards.items():
        torch.save(dict(part), path / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key, _ in part}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def save_trainer_checkpoint(model: LlamaForCausalLM, path: Path) -> Path:
    model.save_pretrained(path)
    torch.save({"state": {}}, path / "optimizer.pt")
    (path / "training_args.bin").write_bytes(b"a pickle nobody should open")
    history = [{"learning_rate": 5e-7}, {"learning_rate": 1e-6}, {"loss": 0.1}]
    state = {"global_step": 40, "log_history": history}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def save_with_tied_head(model: LlamaForCausalLM, path: Path) -> Path:
    """As old exporters do: the tied lm_head and a rotary buffer stored as well."""
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.position_ids"] = torch.arange(7)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


FORMS: dict[str, Callable[[LlamaForCausalLM, Path], Path]] = {
    "directory": save_directory,
    "sharded": save_sharded,
    "bin": save_bin,
    "sharded bin": save_sharded_bin,
    "trainer checkpoint": save_trainer_checkpoint,
    "tied head stored": save_with_tied_head,
}


def save_weights(path: Path, weights: dict[str, Tensor], **config: object) -> Path:
    """A model directory of bare tensors."""
    path.mkdir(parents=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def save_subnet_adapter(
    path: Path,
    base: dict[str, Tensor],
    changes: dict[str, tuple[Tensor, Tensor]],
    base_model: str | None = None,
) -> Path:
    """Our adapter, written by its specification: name -> (indices, values)."""
    from subnet_ft.adapter_file import HEADER_KEY, dump_header, index_key, values_key
    from subnet_ft.storage.codec import checksum, encode_indices

    tensors, records = {}, {}
    for name, (indices, values) in changes.items():
        kind, encoded = encode_indices(indices.int(), base[name].numel())
        tensors[values_key(name)], tensors[index_key(name, kind)] = values, encoded
        there = base[name].reshape(-1)[indices]
        records[name] = {"shape": list(base[name].shape), "nnz": len(indices),
                         "checksum": checksum(there)}  # fmt: skip
    tensors[HEADER_KEY] = dump_header({"base_model": "base", "parameters": records})
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "SUBNET_FT", "base_model_name_or_path": base_model}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
