"""add_weighted_adapter: the sum of several subnetworks as a new one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from subnet_ft import SubnetConfig, SubnetError
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.checkpoints.adapter_mask import open_mask_or_adapter
from subnet_ft.mask import SubnetMask
from tests.helpers import (
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    shapes_of,
    snapshot,
    tiny_llama,
    tokens,
)

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def masks(kind: str) -> dict[str, SubnetMask]:
    """Two masks over every parameter: with entries in common, or with none."""
    whole, second = random_mask(tiny_llama(), 0.3), random_mask(tiny_llama(), 0.2, seed=1)
    return {"first": whole, "second": second if kind == "overlapping" else second - whole}


def trained(kind: str = "overlapping", dtype: torch.dtype = torch.float32) -> Any:
    """A model with adapters "first", active, and "second", both far from the base."""
    model = tiny_llama(dtype)
    both = masks(kind)
    model = peft.get_peft_model(model, SubnetConfig(mask=both["first"]), "first")
    model.add_adapter("second", SubnetConfig(mask=both["second"]))
    generator = torch.Generator().manual_seed(0)
    for layer in sidecar_layers(model):
        for subnet in layer.subnets(tuple(layer.subnet_ft_values)):
            subnet.values.data.add_(torch.randn(subnet.values.shape, generator=generator))
        layer.flush()
    return model


def weights_of(model: Any, active: str | Sequence[str]) -> dict[str, torch.Tensor]:
    """Every base weight while the named adapters are active."""
    model.base_model.set_adapter(active)
    return {layer.name: layer.weight.detach().clone() for layer in sidecar_layers(model)}


@DTYPES
@pytest.mark.parametrize("kind", ["disjoint", "overlapping"])
def test_with_weights_of_one_it_is_both_at_once(kind: str, dtype: torch.dtype) -> None:
    model = trained(kind, dtype)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    together, summed = weights_of(model, ["first", "second"]), weights_of(model, "sum")
    for name, weight in together.items():
        assert_same_bits(weight, summed[name], name)
    both = masks(kind)
    base = snapshot(tiny_llama(dtype))
    assert_off_mask_untouched(base, summed, both["first"] | both["second"])
    with model.disable_adapter():
        for layer in sidecar_layers(model):
            assert_same_bits(base[layer.name], layer.weight.detach(), layer.name)


@DTYPES
def test_what_one_adapter_has_alone_it_keeps_to_the_bit(dtype: torch.dtype) -> None:
    model = trained("disjoint", dtype)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["second"], [1.0], "copy")
    for layer in sidecar_layers(model):
        dense = torch.full(layer.shape, torch.nan).flatten()
        for subnet in layer.subnets(("first", "second")):
            dense[subnet.indices] = subnet.values.detach()
        found, copy, second = layer.subnets(("sum", "copy", "second"))
        assert_same_bits(found.values, dense[found.indices], layer.name)
        assert torch.equal(copy.indices, second.indices)
        assert_same_bits(copy.values, second.values, layer.name)


@pytest.mark.parametrize("weights", [[0.5, 0.25], [1.0, -1.0], [-2.0, 3.0], [0.0, 1.0]])
@pytest.mark.parametrize("kind", ["disjoint", "overlapping"])
def test_deltas_are_weighted(kind: str, weights: list[float]) -> None:
    model = trained(kind)
    before = weights_of(model, "first")
    model.add_weighted_adapter(["first", "second"], weights, "sum")
    assert model.active_adapter == "first"
    for layer in sidecar_layers(model):
        assert_same_bits(before[layer.name], layer.weight.detach(), layer.name)
        base = snapshot(tiny_llama())[layer.name].double().flatten()
        expected = base.clone()
        for subnet, weight in zip(layer.subnets(("first", "second")), weights, strict=True):
            expected[subnet.indices] += weight * (
                subnet.values.detach().double() - subnet.originals
            )
        (found,) = layer.subnets(("sum",))
        torch.testing.assert_close(
            found.values.detach().double(), expected[found.indices], rtol=0, atol=1e-5
        )
        assert_same_bits(found.originals, base.float()[found.indices], layer.name)


def test_an_adapter_minus_itself_is_the_base() -> None:
    model = trained()
    model.add_weighted_adapter(["first", "first"], [1.0, -1.0], "nothing")
    base = snapshot(tiny_llama())
    for name, weight in weights_of(model, "nothing").items():
        torch.testing.assert_close(weight, base[name], rtol=0, atol=1e-6)


@DTYPES
def test_save_and_load(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained("overlapping", dtype)
    model.add_weighted_adapter(["first", "second"], [0.7, -0.3], "sum")
    expected = weights_of(model, "sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(tiny_llama(dtype), tmp_path / "sum")
    for layer in sidecar_layers(loaded):
        assert_same_bits(expected[layer.name], layer.weight.detach(), layer.name)
    both = masks("overlapping")
    union = both["first"] | both["second"]
    stored = open_mask_or_adapter(tmp_path / "sum")
    assert stored == union and stored.shapes == union.shapes
    assert peft.PeftConfig.from_pretrained(tmp_path / "sum").density == union.density


def test_density_counts_parameters_without_entries_too() -> None:
    shapes = shapes_of(tiny_llama())
    name = "model.layers.0.mlp.up_proj.weight"
    mask = SubnetMask({name: random_mask(tiny_llama())[name]}, shapes)
    model = peft.get_peft_model(tiny_llama(), SubnetConfig(mask=mask), "first")
    model.add_adapter("second", SubnetConfig(include=r".*down_proj\.weight", density=0.5))
    model.add_weighted_adapter(["second", "first"], [1, 1], "sum")
    config = model.peft_config["sum"]
    kept = sum(layer.subnet("sum").indices.numel() for layer in sidecar_layers(model))
    assert config._shapes == shapes
    assert config.density == kept / sum(torch.Size(shape).numel() for shape in shapes.values())


def test_it_trains_once_active() -> None:
    model = trained()
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".first." in name for name in trainable)
    model.set_adapter("sum")
    model(tokens(), labels=tokens()).loss.backward()
    for layer in sidecar_layers(model):
        assert layer.subnet("sum").values.grad is not None, layer.name
        assert layer.subnet("first").values.grad is None, layer.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["first", "none"], [1, 1], "sum"), r"expected names among .*'first'.*found \['none'\]"),
        (([], [], "sum"), r"expected names among .*found \[\]"),
        (
            (["first", "second"], [1], "sum"),
            r"expected 2 finite numbers, one an adapter, found \[1\]",
        ),
        ((["first"], [float("nan")], "sum"), r"expected 1 finite numbers"),
        ((["first"], [1], "second"), r"expected a new name, found 'second'"),
        ((["first"], [1], "sum", "svd"), r"combination_type: expected one of .*'linear'.*'svd'"),
    ],
)
def test_errors_change_nothing(arguments: tuple[Any, ...], message: str) -> None:
    model = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(SubnetError, match=message) as error:
        model.add_weighted_adapter(*arguments)
    assert "\n" not in str(error.value)
    assert set(model.peft_config) == {"first", "second"}
    assert {name for name, _ in model.named_parameters()} == set(before)


def test_modules_trained_whole_have_no_sum() -> None:
    config = SubnetConfig(include=r".*q_proj\.weight", modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_llama(tied=False), config, "first")
    with pytest.raises(SubnetError, match="modules_to_save"):
        model.add_weighted_adapter(["first"], [1.0], "sum")
