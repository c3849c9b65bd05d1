"""Adapters that go off and on again write nothing in between, and nobody can tell by looking."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from subnet_ft import SubnetAdamW, SubnetConfig
from subnet_ft.adapter.inject import sidecar_layers
from tests.helpers import assert_same_bits, random_mask, snapshot, tiny_llama, tokens

LINEAR = r".*(self_attn|mlp).*\.weight"
NAME = "model.layers.0.mlp.up_proj.weight"
Pair = tuple[Any, Any]


def trained(dtype: torch.dtype = torch.float32, include: str | None = None) -> Pair:
    """A model whose adapter was trained, and its base by itself."""
    base: Any = tiny_llama(dtype)
    model: Any = tiny_llama(dtype)
    mask = random_mask(model).filter(include) if include else random_mask(model)
    model = peft.get_peft_model(model, SubnetConfig(mask=mask))
    step(model, SubnetAdamW([p for p in model.parameters() if p.requires_grad], lr=0.05))
    return model, base


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def sidecar(model: Any) -> Any:
    return next(layer for layer in sidecar_layers(model) if layer.name == NAME)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_reference_pass_is_the_base_s_and_writes_no_linear_weight(
    dtype: torch.dtype, autocast: bool
) -> None:
    model, base = trained(dtype)
    held, ids = sidecar(model).weight, tokens(seed=1)
    before = held.detach().clone()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with model.disable_adapter():
            reference = model(ids).logits
            assert_same_bits(before, held)  # held before: the tensor, not a look through the model
            assert sidecar(model).live == ()
        assert_same_bits(base(ids).logits, reference)
        assert not torch.equal(model(ids).logits, reference)
    assert_same_bits(before, held)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_second_pass_writes(mode: Callable[[], Any]) -> None:
    model, base = trained()
    held, ids = sidecar(model).weight, tokens(seed=1)
    before = held.detach().clone()
    with mode(), model.disable_adapter():
        for _ in range(3):
            assert_same_bits(base(ids).logits, model(ids).logits)
        assert_same_bits(base.get_parameter(NAME), held)
    assert_same_bits(before, held)


LOOKS: dict[str, Callable[[Any], torch.Tensor]] = {
    "attribute": lambda m: m.get_submodule(NAME.removesuffix(".weight")).weight,
    "get_parameter": lambda m: m.get_parameter(NAME),
    "named_parameters": lambda m: dict(m.named_parameters())[NAME],
    "state_dict": lambda m: m.state_dict()[NAME],
    "sidecar": lambda m: sidecar(m).weight,
    "deepcopy": lambda m: copy.deepcopy(m).get_parameter(NAME),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_finds_the_base(look: str, grad: bool) -> None:
    model, base = trained()
    before = snapshot(model)
    with torch.set_grad_enabled(grad), model.disable_adapter():
        found = LOOKS[look](model.get_base_model())
        assert_same_bits(base.get_parameter(NAME), found)
    for name, parameter in model.named_parameters():
        assert_same_bits(before[name], parameter, name)


def test_a_pass_with_gradients_is_the_base_s() -> None:
    model, base = trained(include=LINEAR)
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    ids = tokens(seed=1)
    with model.disable_adapter():
        model(input_ids=ids, labels=ids).loss.backward()
    base(input_ids=ids, labels=ids).loss.backward()
    assert_same_bits(base.get_input_embeddings().weight.grad, embeddings.grad)


@pytest.mark.parametrize("how", ["SubnetAdamW", "AdamW", "by hand"])
def test_values_changed_while_they_are_off_are_written_when_they_come_on(how: str) -> None:
    model, base = trained()
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = (SubnetAdamW if how == "SubnetAdamW" else torch.optim.AdamW)(values, lr=0.05)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad(), model.disable_adapter():
        if how == "by hand":
            for value in values:
                value.data.mul_(2)
            model.flush()
        else:
            optimizer.step()
        assert_same_bits(base(ids).logits, model(ids).logits)
    for layer in sidecar_layers(model):
        (subnet,) = layer.subnets()
        assert_same_bits(subnet.values, layer.weight.data.flatten()[subnet.indices], layer.name)


@pytest.mark.parametrize("verb", ["delete", "unload", "other"])
def test_verbs_while_the_write_waits(verb: str) -> None:
    model, base = trained()
    expected = dict(base.named_parameters())
    if verb == "other":
        model.add_adapter("other", SubnetConfig(mask=random_mask(tiny_llama(), 0.2, seed=1)))
    model.base_model.disable_adapter_layers()
    root = model.get_base_model()
    if verb == "delete":
        model.delete_adapter("default")
    elif verb == "unload":
        model.unload()
    else:
        model.set_adapter("other")  # which starts at the base's values
        model.base_model.enable_adapter_layers()
    for name, parameter in root.named_parameters():
        if name in expected:
            assert_same_bits(expected[name], parameter, name)
