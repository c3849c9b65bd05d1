"""bitsandbytes bases: NF4, FP4 and LLM.int8, with the values beside the packed weights."""

import copy
import logging
from pathlib import Path
from typing import Any

import accelerate.hooks
import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from subnet_ft import SubnetAdamW, SubnetConfig, SubnetError, SubnetMask
from subnet_ft.adapter.drift import drifted, off_mask_sums
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.adapter.kept_dtype import KeptDtype
from tests.helpers import assert_same_bits
from tests.quantized_helpers import (
    BF16,
    FP16,
    FP32,
    IDS,
    Q_PROJ,
    Bases,
    attach,
    dequantized,
    eight_bit,
    four_bit,
    full_precision,
    linears,
    load,
    logits,
    mask_of,
    plain,
    save_bases,
    shift,
    step,
    trained,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return save_bases(tmp_path_factory.mktemp("bases"))


# The forward pass, 4-bit: to the bit.


@pytest.mark.parametrize("double", [False, True], ids=["single", "double quantization"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("dtype", "compute"), [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16), (BF16, FP16)]
)
def test_untouched_values_give_the_bare_models_output(
    bases: Bases, dtype: torch.dtype, compute: torch.dtype, kind: str, double: bool
) -> None:
    bare = logits(four_bit(bases, dtype, compute, kind, double))
    model = attach(four_bit(bases, dtype, compute, kind, double))
    assert_same_bits(logits(model), bare)
    assert_same_bits(model(input_ids=IDS).logits, bare)  # with gradients, too


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_output_is_the_merged_models(bases: Bases, dtype: torch.dtype, kind: str) -> None:
    model = attach(four_bit(bases, dtype, kind=kind, double=True))
    shift(model)
    found = logits(model)
    merged = model.merge_and_unload()
    assert_same_bits(logits(merged), found)
    merged.eval()
    assert_same_bits(logits(merged), found)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_merging_is_exact(bases: Bases, dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
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


def test_a_merged_model_has_the_widest_dtype_there_is(bases: Bases) -> None:
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
def test_a_run_is_the_masked_run_on_the_dequantized_model(bases: Bases, kind: str) -> None:
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
def test_no_tokens(kind: str) -> None:
    """An expert that no token is sent to."""
    model = attach(nn.Sequential(quantized_linear(kind)), include="all", mask=None, density=0.1)
    output = model(torch.randn(0, 128, requires_grad=True))
    output.sum().backward()
    assert output.shape == (0, 64)


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
def test_int8_starts_as_the_bare_model(bases: Bases, dtype: torch.dtype, training: bool) -> None:
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
def test_switching_disabling_deleting_unloading(bases: Bases, kind: str) -> None:
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


def test_sum_of_active_adapters_is_the_merged_weight(bases: Bases) -> None:
    model = attach(four_bit(bases))
    shift(model)
    model.add_adapter("other", SubnetConfig(mask=mask_of(0.3, seed=1)))
    model.set_adapter("other")
    shift(model, seed=1)
    model.base_model.set_adapter(["default", "other"])
    found = logits(model)
    assert_same_bits(logits(model.merge_and_unload(adapter_names=["default", "other"])), found)


def test_merge_adapter_keeps_the_values_beside(
    bases: Bases, caplog: pytest.LogCaptureFixture
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
def test_a_step_between_forward_and_backward_is_refused(bases: Bases, kind: str) -> None:
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


def test_a_reference_pass_between_forward_and_backward_is_fine(bases: Bases) -> None:
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


def test_copies_are_independent(bases: Bases) -> None:
    model = attach(four_bit(bases))
    twin = copy.deepcopy(model)
    before = logits(twin)
    shift(model)
    assert torch.equal(logits(twin), before) and not torch.equal(logits(model), before)
    assert all(type(p) is KeptDtype for p in trained(twin))


# Files


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_saved_and_loaded(
    bases: Bases, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    bases: Bases, caplog: pytest.LogCaptureFixture, tmp_path: Path
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


def test_all_linear_layers_are_quantized_ones(bases: Bases) -> None:
    for kind in ("nf4", "int8"):
        model = attach(load(bases, kind), mask=None, density=0.05)
        names = {layer.name for layer in sidecar_layers(model)}
        assert names == {f"{name}.weight" for name in linears(model.get_base_model())}
        assert names and all(not layer.in_place for layer in sidecar_layers(model))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_only_quantized_weights_that_are_masked_make_a_full_precision_model(
    bases: Bases, kind: str
) -> None:
    model = attach(load(bases, kind), mask=mask_of().filter(".*norm.*|.*embed.*"))
    shift(model)
    found = logits(model)
    merged = model.merge_and_unload()
    assert len(linears(merged)) == 14 and merged.is_quantized
    assert torch.equal(logits(merged), found)


# What bitsandbytes does behind the back


def test_evaluation_does_not_repack_the_weights(bases: Bases) -> None:
    """On a CPU with AVX512-BF16 it would, rounding the scales and ending all gradients there."""
    model = attach(four_bit(bases), mask=mask_of().filter(".*(embed|down_proj).*"))
    before = off_mask_sums(model.get_base_model())
    first = logits(model)
    assert_same_bits(logits(model.eval()), first)
    with model.disable_adapter():
        logits(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(model))
    assert not drifted(before, off_mask_sums(model.get_base_model()))


def test_repacked_weights_are_refused(bases: Bases) -> None:
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    model = four_bit(bases).eval()
    logits(model)
    with pytest.raises(SubnetError, match="packed for inference"):
        attach(model)


def test_packing_is_allowed_again_when_the_adapter_is_gone(bases: Bases) -> None:
    def packs(model: Any) -> set[bool]:
        return {bool(m.support_avx512bf16_for_cpu) for m in linears(model).values()}

    model = four_bit(bases)
    before = packs(model)
    model = attach(model)
    assert packs(model) == {False}
    assert packs(model.unload()) == before


def test_a_masked_bias_keeps_its_dtype(bases: Bases) -> None:
    """bitsandbytes casts biases in place to what the layer computes in."""
    model = attach(four_bit(bases, BF16, FP32))
    shift(model)
    found = logits(model)
    with model.disable_adapter():
        logits(model)
    assert model.get_base_model().get_submodule(Q_PROJ).bias.dtype == BF16
    assert_same_bits(logits(model), found)


@pytest.mark.parametrize("first", ["hook", "adapter"])
def test_accelerate_hooks_run_the_values_too(bases: Bases, first: str) -> None:
    """A model dispatched to several devices has one on each layer, which keeps its forward."""
    model = four_bit(bases)
    bare = logits(model)
    hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)

    def add_hooks(root: Any) -> None:
        for module in linears(root).values():
            accelerate.hooks.add_hook_to_module(module, hook)

    if first == "hook":
        add_hooks(model)
    model = attach(model)
    if first == "adapter":
        add_hooks(model.get_base_model())
    shift(model)
    found = logits(model)
    assert not torch.equal(found, bare)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model.unload()), bare)
    merged = twin.merge_and_unload()
    assert_same_bits(logits(merged), found)
    assert merged.get_submodule(Q_PROJ)._hf_hook is not None


# Refused


def refused(module: nn.Module, **config: Any) -> str:
    before = [type(m) for m in module.modules()]
    with pytest.raises(SubnetError) as raised:
        peft.get_peft_model(nn.Sequential(module), SubnetConfig(**({"include": "all"} | config)))
    assert [type(m) for m in module.modules()] == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_cannot_be_masked_is_refused() -> None:
    conv = quantized_linear("nf4")
    conv.source_cls = Conv1D
    assert "Conv1D" in refused(conv)
    loose = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    assert "not quantized yet" in refused(loose)
    half = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True).to("cpu")
    assert "has_fp16_weights" in refused(half)
    assert "Embedding4bit" in refused(bnb.nn.Embedding4bit(64, 64).to("cpu"))
    assert 'clip="compact"' in refused(quantized_linear("nf4"), clip="dense")
    assert "bf16 base" in refused(quantized_linear("nf4"), values_dtype="bfloat16")


def test_other_quantizations_are_refused_by_name() -> None:
    model: Any = plain()
    model.quantization_method = "hqq"
    for config in (
        SubnetConfig(),
        SubnetConfig(mask=SubnetMask.synthetic({"a.weight": (2, 2)}, 1)),
    ):
        with pytest.raises(SubnetError, match="quantized by bitsandbytes, found hqq"):
            peft.get_peft_model(model, config)


def test_a_mask_of_another_shape_is_refused(bases: Bases) -> None:
    mask = SubnetMask.synthetic({f"{Q_PROJ}.weight": (2048, 1)}, 0.5)
    with pytest.raises(SubnetError, match=r"shape \(2048, 1\), weight is \(64, 64\)"):
        attach(four_bit(bases), mask=mask)
