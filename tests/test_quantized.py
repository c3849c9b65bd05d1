"""bitsandbytes bases: NF4, FP4 and LLM.int8, with the values beside the packed weights."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from subnet_ft import SubnetAdamW, SubnetConfig, SubnetError, SubnetMask
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.adapter.kept_dtype import KeptDtype
from tests.helpers import assert_same_bits, random_mask, tokens

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
IDS = tokens()
Q_PROJ = "model.layers.0.self_attn.q_proj"


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


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The same tiny model saved in fp32 and in bf16."""
    saved = {}
    for dtype in (FP32, BF16):
        saved[dtype] = tmp_path_factory.mktemp("base")
        plain(dtype).save_pretrained(saved[dtype])
    return saved


def four_bit(
    bases: dict[torch.dtype, Path],
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


def eight_bit(bases: dict[torch.dtype, Path], dtype: torch.dtype = FP32) -> Any:
    config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        bases[dtype], dtype=dtype, device_map="cpu", quantization_config=config
    ).train()


def load(bases: dict[torch.dtype, Path], kind: str, dtype: torch.dtype = FP32) -> Any:
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
    dense = state.code[nibbles].view(-1, state.blocksize) * absmax.view(-1, 1)
    return dense.view(state.shape).to(dtype)


def full_precision(model: Any, dtype: torch.dtype) -> Any:
    """The model a quantized one stands for, made without the library."""
    full: Any = plain(dtype)
    full.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in full.state_dict()}
        | {f"{name}.weight": dequantized(m, dtype) for name, m in linears(model).items()}
    )
    return full


# The forward pass, 4-bit: to the bit.


@pytest.mark.parametrize("double", [False, True], ids=["single", "double quantization"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("dtype", "compute"), [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16), (BF16, FP16)]
)
def test_untouched_values_give_the_bare_models_output(
    bases: Any, dtype: torch.dtype, compute: torch.dtype, kind: str, double: bool
) -> None:
    bare = logits(four_bit(bases, dtype, compute, kind, double))
    model = attach(four_bit(bases, dtype, compute, kind, double))
    assert_same_bits(logits(model), bare)
    assert_same_bits(model(input_ids=IDS).logits, bare)  # with gradients, too


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_output_is_the_merged_models(bases: Any, dtype: torch.dtype, kind: str) -> None:
    model = attach(four_bit(bases, dtype, kind=kind, double=True))
    shift(model)
    found = logits(model)
    merged = model.merge_and_unload()
    assert_same_bits(logits(merged), found)
    merged.eval()
    assert_same_bits(logits(merged), found)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_merging_is_exact(bases: Any, dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    """Outside the mask what the base dequantizes to, inside the values, also where no mask is."""
    mask = mask_of().filter(exclude=r".*down_proj.*")
    expected = full_precision(load(bases, kind, dtype), dtype).state_dict()
    model = attach(load(bases, kind, dtype), mask=mask)
    shift(model)
    values = {la.name: la.subnet("default").values.detach().clone() for la in sidecar_layers(model)}
    merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():
        if name in mask:
            expected[name].view(-1)[mask[name].long()] = values[name].to(dtype)
        assert_same_bits(weight, expected[name], name)
        assert type(weight) is nn.Parameter
    assert type(merged.get_submodule(Q_PROJ)) is nn.Linear
    assert not merged.is_quantized and not merged.is_loaded_in_4bit
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert_same_bits(logits(again.train()), logits(merged))


def test_a_merged_model_has_the_widest_dtype_there_is(bases: Any) -> None:
    """Computing in fp32, the values are not rounded to the bf16 of the rest."""
    model = attach(four_bit(bases, BF16, FP32))
    shift(model)
    values = model.get_base_model().get_submodule(Q_PROJ).subnet_weight.subnet("default").values
    values = values.detach().clone()
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {FP32} and merged.config.dtype == FP32
    index = mask_of()[f"{Q_PROJ}.weight"].long()
    assert_same_bits(merged.get_submodule(Q_PROJ).weight.view(-1)[index], values)


# The backward pass.


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_run_is_the_masked_run_on_the_dequantized_model(bases: Any, kind: str) -> None:
    """Forward, backward, every parameter kind and the optimizer, compared as bits after 4 steps."""
    model = four_bit(bases, kind=kind, double=True)
    full = attach(full_precision(model, FP32), weight_grad="compact").train()
    model = attach(model)
    optimizers = [torch.optim.AdamW(trained(m), lr=1e-2, weight_decay=0.1) for m in (model, full)]
    for _ in range(4):
        losses = [step(m, o) for m, o in zip((model, full), optimizers, strict=True)]
        assert losses[0] == losses[1]
    named = dict(full.named_parameters())
    for name, values in model.named_parameters():
        if values.requires_grad:
            assert_same_bits(values, named[name], name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_a_layer(kind: str, autocast: bool) -> None:
    """Against autograd on the dense weight: inputs, values of weight and bias, three dimensions."""
    layer: Any = quantized_linear(kind)
    model: Any = nn.Sequential(layer).train()
    mask = SubnetMask.synthetic({"0.weight": (64, 128), "0.bias": (64,)}, 0.3)
    model = attach(model, mask=mask)
    shift(model)
    x = torch.randn(2, 5, 128, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    weight, bias = dequantized(layer, FP32), layer._parameters["bias"].detach().clone()
    for tensor, name in ((weight, "weight"), (bias, "bias")):
        subnet = layer.get_submodule(f"subnet_{name}").subnet("default")
        tensor.view(-1)[subnet.indices] = subnet.values.detach()
        tensor.requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        found, expected = model(x), nn.functional.linear(reference, weight, bias)
    seed = torch.randn_like(found)
    found.backward(seed)
    expected.backward(seed.to(expected.dtype))
    tolerance = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, expected.to(found.dtype), **tolerance)
    torch.testing.assert_close(x.grad, reference.grad, **tolerance)
    for tensor, name in ((weight, "weight"), (bias, "bias")):
        subnet = layer.get_submodule(f"subnet_{name}").subnet("default")
        gathered = tensor.grad.view(-1)[subnet.indices]
        torch.testing.assert_close(subnet.values.grad, gathered, **tolerance)


def quantized_linear(kind: str, cols: int = 128, rows: int = 64) -> Any:
    if kind == "int8":
        return bnb.nn.Linear8bitLt(cols, rows, has_fp16_weights=False).to("cpu")
    return bnb.nn.Linear4bit(cols, rows, compute_dtype=FP32, quant_type=kind).to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_nothing_dense_is_kept_for_backward(kind: str) -> None:
    model = attach(
        nn.Sequential(quantized_linear(kind, 512, 256)), include="all", mask=None, density=0.1
    )
    kept = []
    with saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t):
        model(torch.randn(2, 3, 512, requires_grad=True))
    assert kept
    assert all(
        shape.numel() < 512 * 256 / 4 or not dtype.is_floating_point for shape, dtype in kept
    )


# LLM.int8


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_int8_starts_as_the_bare_model(bases: Any, dtype: torch.dtype, training: bool) -> None:
    bare = logits(eight_bit(bases, dtype).train(training))
    model = attach(eight_bit(bases, dtype)).train(training)
    assert torch.equal(logits(model), bare)


def test_int8_adds_what_the_values_change() -> None:
    layer = quantized_linear("int8", 1024, 2000)  # two chunks of rows
    model = attach(nn.Sequential(layer), include="all", mask=None, density=0.1).eval()
    x = torch.randn(3, 1024)
    before = model(x)
    shift(model)
    subnet = layer.subnet_weight.subnet("default")
    delta = torch.zeros(2000 * 1024)
    delta[subnet.indices] = (
        subnet.values.detach() - dequantized(layer, FP32).view(-1)[subnet.indices]
    )
    expected = before + x @ delta.view(2000, 1024).t()
    bias = layer.subnet_bias.subnet("default")
    expected[:, bias.indices] += bias.values.detach() - bias.originals
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


# The verbs


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_switching_disabling_deleting_unloading(bases: Any, kind: str) -> None:
    bare = logits(load(bases, kind))
    packed = {n: m.weight.data.clone() for n, m in linears(load(bases, kind)).items()}
    model = attach(load(bases, kind))
    shift(model)
    first = logits(model)
    model.add_adapter("other", SubnetConfig(mask=mask_of(0.3, seed=1)))
    model.set_adapter("other")
    assert torch.equal(logits(model), bare)
    shift(model, seed=1)
    second = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    both = logits(model)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
    model.delete_adapter("sum")
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), bare)
    for name, module in linears(unloaded).items():
        assert torch.equal(module.weight.data, packed[name])
        assert type(module) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def test_sum_of_active_adapters_is_the_merged_weight(bases: Any) -> None:
    model = attach(four_bit(bases))
    shift(model)
    model.add_adapter("other", SubnetConfig(mask=mask_of(0.3, seed=1)))
    model.set_adapter("other")
    shift(model, seed=1)
    model.base_model.set_adapter(["default", "other"])
    found = logits(model)
    assert_same_bits(logits(model.merge_and_unload(adapter_names=["default", "other"])), found)


def test_merge_adapter_keeps_the_values_beside(
    bases: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As TRL does around a sync to vLLM; nothing is quantized again."""
    model = attach(four_bit(bases))
    shift(model)
    found, packed = logits(model), model.get_base_model().get_submodule(Q_PROJ).weight.data.clone()
    model.merge_adapter()
    assert "merge_and_unload" in caplog.text
    assert_same_bits(logits(model), found)
    assert torch.equal(model.get_base_model().get_submodule(Q_PROJ).weight.data, packed)
    model.unmerge_adapter()
    assert_same_bits(logits(model), found)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_step_between_forward_and_backward_is_refused(bases: Any, kind: str) -> None:
    for make in (torch.optim.SGD, SubnetAdamW):
        model = attach(load(bases, kind))
        optimizer = make(trained(model), lr=0.1)
        step(model, optimizer)
        loss = model(input_ids=IDS, labels=IDS).loss
        for values in trained(model):
            values.grad = torch.ones_like(values)
        optimizer.step()
        with pytest.raises(SubnetError, match="run backward before"):
            loss.backward()


def test_a_reference_pass_between_forward_and_backward_is_fine(bases: Any) -> None:
    gradients = []
    for interrupted in (False, True):
        model = attach(four_bit(bases))
        shift(model)
        loss = model(input_ids=IDS, labels=IDS).loss
        if interrupted:
            with model.disable_adapter():
                logits(model)
        loss.backward()
        gradients.append(torch.cat([p.grad for p in trained(model)]))
    assert torch.equal(*gradients)


def test_copies_are_independent(bases: Any) -> None:
    model = attach(four_bit(bases))
    twin = copy.deepcopy(model)
    before = logits(twin)
    shift(model)
    assert torch.equal(logits(twin), before) and not torch.equal(logits(model), before)
    assert all(type(p) is KeptDtype for p in trained(twin))


# Files


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_saved_and_loaded(
    bases: Any, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = attach(load(bases, kind))
    shift(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(bases, kind), tmp_path, is_trainable=True)
    assert not caplog.records  # the same base: nothing to warn of
    assert torch.equal(logits(again), logits(model))
    for a, b in zip(trained(again), trained(model), strict=True):
        assert_same_bits(a, b)
    # Whole weights of the rounded base: in the base before it, most would be the wrong ones.
    with pytest.raises(SubnetError, match="wrong base model"):
        peft.PeftModel.from_pretrained(plain(), tmp_path)


def test_a_mask_of_the_full_precision_base_applies(
    bases: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Its checksums cannot hold of rounded weights: one warning; those of the rest are checked."""
    peft.get_peft_model(plain(), SubnetConfig(mask=mask_of())).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = peft.PeftModel.from_pretrained(four_bit(bases), tmp_path)
    assert sum("cannot be told" in record.message for record in caplog.records) == 1
    assert {layer.name for layer in sidecar_layers(model)} == set(mask_of())
    other = four_bit(bases)
    other.model.norm.weight.data += 0.1
    with pytest.raises(SubnetError, match=r"model.norm.weight: wrong base model"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_all_linear_layers_are_quantized_ones(bases: Any) -> None:
    for kind in ("nf4", "int8"):
        model = attach(load(bases, kind), mask=None, density=0.05)
        names = {layer.name for layer in sidecar_layers(model)}
        assert names == {f"{name}.weight" for name in linears(model.get_base_model())}
        assert names and all(not layer.in_place for layer in sidecar_layers(model))
        with pytest.raises(StopIteration):
            next(attach_nothing(model))


def attach_nothing(model: Any) -> Iterator[Any]:
    """Sidecars of parameters that are not quantized."""
    return (layer for layer in sidecar_layers(model) if layer.in_place)
