"""Several adapters on one model: merged one by one, loaded one after another."""

from pathlib import Path

import peft
import pytest
import torch

from subnet_ft import SubnetConfig
from subnet_ft.adapter.inject import sidecar_layers
from tests.helpers import assert_same_bits, snapshot, tiny_llama

FIRST, SECOND = r".*q_proj\.weight", r".*v_proj\.weight"


def two_adapters() -> peft.PeftModel:
    """One on the q, one on the v projections, both away from the base."""
    model = peft.get_peft_model(tiny_llama(), SubnetConfig(include=FIRST, density=0.1), "first")
    model.add_adapter("second", SubnetConfig(include=SECOND, density=0.1))
    for layer in sidecar_layers(model):
        for subnet in layer.subnets(tuple(layer.subnet_ft_values)):
            subnet.values.data.add_(1.0)
        layer.flush()
    return model


@pytest.mark.parametrize("name", ["first", "second"])
def test_unloading_one_leaves_nothing_of_the_other(name: str) -> None:
    merged = two_adapters().merge_and_unload(adapter_names=[name])
    moved = "q_proj" if name == "first" else "v_proj"
    for key, weight in snapshot(tiny_llama()).items():
        if moved in key and key.endswith("weight"):
            assert not torch.equal(weight, merged.get_parameter(key)), key
        else:
            assert_same_bits(weight, merged.get_parameter(key), key)


@pytest.mark.parametrize("trainable", [True, False])
def test_loading_another_leaves_the_first_as_trainable_as_it_was(
    trainable: bool, tmp_path: Path
) -> None:
    saved = peft.get_peft_model(tiny_llama(), SubnetConfig(include=FIRST, density=0.1))
    saved.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trainable)
    model.load_adapter(tmp_path, "other", is_trainable=not trainable)
    for layer in sidecar_layers(model):
        assert layer.subnet("default").values.requires_grad == trainable
        assert layer.subnet("other").values.requires_grad == (not trainable)
