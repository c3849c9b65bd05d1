"""A tiny model in NF4, FP4 and LLM.int8, and what it stands for."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from subnet_ft import SubnetConfig, SubnetMask
from tests.helpers import random_mask, tokens

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
IDS = tokens()
Q_PROJ = "model.layers.0.self_attn.q_proj"
Bases = dict[torch.dtype, Path]


def plain(dtype: torch.dtype = FP32) -> LlamaForCausalLM:
    """A tiny Llama; rows are whole blocks of 64, else bitsandbytes 0.50's AVX-512 kernel errs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        attention_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def save_bases(directory: Path) -> Bases:
    """The same tiny model saved in fp32 and in bf16."""
    saved = {dtype: directory / str(dtype) for dtype in (FP32, BF16)}
    for dtype, path in saved.items():
        plain(dtype).save_pretrained(path)
    return saved


def four_bit(
    bases: Bases,
    dtype: torch.dtype = FP32,
    compute: torch.dtype | None = None,
    kind: str = "nf4",
    double: bool = False,
) -> Any:
    """Load in 4 bits; compute in the model's own dtype by default."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute or dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        bases[dtype], dtype=dtype, device_map="cpu", quantization_config=config
    ).train()


def eight_bit(bases: Bases, dtype: torch.dtype = FP32) -> Any:
    config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        bases[dtype], dtype=dtype, device_map="cpu", quantization_config=config
    ).train()


def load(bases: Bases, kind: str, dtype: torch.dtype = FP32) -> Any:
    return eight_bit(bases, dtype) if kind == "int8" else four_bit(bases, dtype, kind=kind)


def mask_of(density: float = 0.2, seed: int = 0) -> SubnetMask:
    """Of the full-precision model: entries of every parameter, quantized later or not."""
    return random_mask(plain(), density, seed)


def attach(model: Any, **config: Any) -> Any:
    return peft.get_peft_model(model, SubnetConfig(**({"mask": mask_of()} | config)))


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def shift(model: Any, seed: int = 0) -> None:
    """Values as training would leave them: not representable in bf16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in trained(model):
            values.add_(torch.randn(values.shape, generator=generator), alpha=0.01)
    model.base_model.flush()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def linears(model: Any) -> dict[str, Any]:
    kinds = bnb.nn.Linear4bit | bnb.nn.Linear8bitLt
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def dequantized(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """By bitsandbytes' own functions, in fp32 and then rounded."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return (module.weight.data.float() * scale.view(-1, 1) * (1 / 127)).to(dtype)
    state = module.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    code = module.weight.data.view(-1)
    nibbles = torch.stack([code >> 4, code & 15], 1).view(-1).long()
    dense = levels(state)[nibbles].view(-1, state.blocksize) * absmax.view(-1, 1)
    return dense.view(state.shape).to(dtype)


def levels(state: Any) -> torch.Tensor:
    """The sixteen values of a 4-bit kind, with the signs of zero this processor gives them.

    FP4's second zero is +0 where bitsandbytes computes with AVX-512, -0 where it does not.
    """
    pairs = torch.arange(0, 16, 2, dtype=torch.uint8).repeat(4)  # a block: each code four times
    block = torch.ops.bitsandbytes.dequantize_4bit(
        pairs * 17 + 1, torch.ones(1), 64, state.quant_type, (1, 64), FP32
    )
    signed: torch.Tensor = block[0, :16]
    assert torch.equal(signed, state.code)
    return signed


def full_precision(model: Any, dtype: torch.dtype) -> Any:
    """The model a quantized one stands for, made without the library."""
    full: Any = plain(dtype)
    full.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in full.state_dict()}
        | {f"{name}.weight": dequantized(m, dtype) for name, m in linears(model).items()}
    )
    return full
