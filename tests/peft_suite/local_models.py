"""Tiny models in a folder, in place of those that PEFT's tests fetch from the Hub."""

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
DECODER = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 128, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
OPT = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 128, "d_model": 32, "max_position_embeddings": 128} | {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}

# Task -> (class of the model, class of its config, sizes); all names are transformers'.
MODELS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "decoder": [
        ("LlamaForCausalLM", "LlamaConfig", DECODER),
        ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"tie_word_embeddings": True}),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | {"head_dim": 8}),
        ("GPT2LMHeadModel", "GPT2Config", GPT2),
        ("OPTForCausalLM", "OPTConfig", OPT),
    ],
    "encoder_decoder": [
        ("T5ForConditionalGeneration", "T5Config", T5),
        ("BartForConditionalGeneration", "BartConfig", BART),
    ],
    "seq_classifier": [
        ("BertForSequenceClassification", "BertConfig", SIZES),
        ("LlamaForSequenceClassification", "LlamaConfig", DECODER),
    ],
    "feature_extraction": [
        ("BertModel", "BertConfig", SIZES),
        ("RobertaModel", "RobertaConfig", SIZES),
    ],
}


def build(folder: Path) -> dict[str, list[str]]:
    """Save the models, the same each time.

    Args:
        folder: Where, each in a directory of its own.

    Returns:
        Task -> directories.
    """
    made: dict[str, list[str]] = {}
    for task, models in MODELS.items():
        for model, config, sizes in models:
            directory = folder / f"tiny-{model}"
            torch.manual_seed(0)
            getattr(transformers, model)(getattr(transformers, config)(**sizes)).save_pretrained(
                directory
            )
            made.setdefault(task, []).append(str(directory))
    return made
