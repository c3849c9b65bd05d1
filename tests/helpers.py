"""Tiny models and comparisons that several test modules share."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subnet_ft.mask import SubnetMask


def tiny_llama(
    dtype: torch.dtype = torch.float32, *, tied: bool = True, seed: int = 0, vocab: int = 96
) -> LlamaForCausalLM:
    """A two-layer Llama whose matrices exceed 4096 elements, with random, reproducible weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        attention_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def random_mask(model: nn.Module, density: float = 0.1, seed: int = 0) -> SubnetMask:
    """Entries of every parameter: linear, tied embedding, norms, biases."""
    return SubnetMask.synthetic(shapes_of(model), density, seed)


def tokens(batch: int = 2, length: int = 12, vocab: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, so that -0.0 differs from 0.0 and NaN equals itself."""
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(view)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    assert a.dtype == b.dtype and a.shape == b.shape, what
    different = (as_integers(a) != as_integers(b)).sum().item()
    assert different == 0, f"{what}: {different} of {a.numel()} entries differ"


def assert_off_mask_untouched(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], mask: SubnetMask
) -> None:
    """Every entry outside the mask has the bits it had."""
    for name, weight in before.items():
        kept = torch.ones(weight.numel(), dtype=torch.bool)
        if name in mask:
            kept[mask[name].long()] = False
        assert_same_bits(weight.flatten()[kept], after[name].flatten()[kept], name)
