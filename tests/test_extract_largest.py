"""Extraction by size: the largest changes of each parameter, up to a share of it."""

import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from typer.testing import CliRunner

from subnet_ft import SubnetConfig, SubnetMask
from subnet_ft.analysis.density import overall_density
from subnet_ft.cli.main import app
from subnet_ft.errors import CheckpointError, ConfigError, MaskMismatchError
from subnet_ft.extract import extract_mask
from subnet_ft.extract.largest import magnitudes
from tests.checkpoint_helpers import FORMS, save_directory, save_weights, tiny_llama, tuned_from


def largest(delta: torch.Tensor, keep: float) -> list[int]:
    """By sorting: what changed, the largest first, of equal ones the lowest index first."""
    size = delta.flatten().abs()
    count = min(int((size != 0).sum()), max(1, round(keep * size.numel())))
    return sorted(size.argsort(descending=True, stable=True)[:count].tolist())


@pytest.mark.parametrize("keep", [1e-9, 0.02, 0.25, 1.0])
@pytest.mark.parametrize("chunk", [8, 64, 1 << 20])
def test_the_largest_are_kept(keep: float, chunk: int, tmp_path: Path) -> None:
    base = {
        "a": torch.randn(24, 40),
        "b": torch.randn(333),
        "c": torch.randn(30),
        "d": torch.ones(5),
    }
    delta = {
        "a": torch.randn(24, 40) * 1e-5,
        "b": torch.randint(-2, 3, (333,)) * 2.0**-10,  # nearly all of equal size
        "c": torch.randn(30) * (torch.arange(30) == 17),  # one changed
        "d": torch.zeros(5),
    }
    tuned = {name: base[name] + delta[name] for name in base}
    pair = save_weights(tmp_path / "base", base), save_weights(tmp_path / "tuned", tuned)
    mask = extract_mask(*pair, keep=keep, chunk=chunk)
    for name in base:
        expected = largest(tuned[name] - base[name], keep)
        assert (mask[name].tolist() if name in mask else []) == expected, name
    assert mask.metadata["rule"] == f"largest:{keep:g}"
    assert mask.metadata["compared_in"] == "float32"
    assert overall_density(mask).changed == overall_density(extract_mask(*pair)).changed


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, tmp_path: Path) -> None:
    base = tiny_llama()
    tuned = tuned_from(base)
    paths = [FORMS[form](m, tmp_path / side) for side, m in (("base", base), ("tuned", tuned))]
    mask = extract_mask(*paths, keep=0.05, output=tmp_path / "mask.safetensors", chunk=640)
    assert SubnetMask.load(tmp_path / "mask.safetensors") == mask
    others = dict(tuned.named_parameters())
    for name, parameter in base.named_parameters():
        delta = others[name].float() - parameter.float()
        found = mask[name].tolist() if name in mask else []
        assert found == largest(delta, 0.05), name
    peft.get_peft_model(base, SubnetConfig(mask=mask))  # and its checksums are the base's


@pytest.mark.filterwarnings("ignore")
def test_a_lora_is_a_scout_by_its_own_delta(tmp_path: Path) -> None:
    """Merged into a bf16 base most of it would be rounded away."""
    base = tiny_llama()
    save_directory(base, tmp_path / "base")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    adapted.save_pretrained(tmp_path / "lora")
    merged = extract_mask(tmp_path / "base", tmp_path / "lora")
    mask = extract_mask(tmp_path / "base", tmp_path / "lora", keep=0.9, chunk=64)
    name = "model.layers.1.mlp.up_proj.weight"
    layer = adapted.get_base_model().model.layers[1].mlp.up_proj
    weight = base.get_parameter(name).float()
    delta = (weight + layer.get_delta_weight("default").float()) - weight
    assert mask[name].tolist() == largest(delta, 0.9)
    assert set(mask) == set(merged) and merged.density < mask.density / 2
    peft.get_peft_model(base, SubnetConfig(mask=mask))


def test_magnitudes_order_as_the_numbers_do() -> None:
    values = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1.5, 2.0, 3e38, math.inf], np.float32)
    bits = magnitudes(np.zeros_like(values), values)
    assert (np.argsort(bits, kind="stable") == np.argsort(np.abs(values), kind="stable")).all()
    infinite = np.array([math.inf, -math.inf], np.float32)
    assert magnitudes(infinite, infinite).tolist() == [0, 0]
    assert magnitudes(infinite, infinite[::-1]).tolist() == [0x7F800000] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    weights = {"a": torch.randn(9, 9)}
    base = save_weights(tmp_path / "base", weights)
    weights["a"][3, 3] = value
    tuned = save_weights(tmp_path / "tuned", weights)
    with pytest.raises(CheckpointError, match=f"^a: expected finite.*found {value}"):
        extract_mask(base, tuned, keep=0.1, output=tmp_path / "mask")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


def test_bad_input(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "base", {"a": torch.ones(4)})
    for keep in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match=r"keep must be in \(0, 1\]"):
            extract_mask(path, path, keep=keep)
    with pytest.raises(ConfigError, match="a rule or keep"):
        extract_mask(path, path, "abs:1e-5", keep=0.1)
    with pytest.raises(MaskMismatchError, match=r"rule largest:0.1, found none of 4"):
        extract_mask(path, path, keep=0.1)


def test_on_the_command_line(tmp_path: Path) -> None:
    base = tiny_llama()
    pair = save_directory(base, tmp_path / "base"), save_directory(tuned_from(base), tmp_path / "t")
    output = tmp_path / "mask.safetensors"
    arguments = ["extract", *map(str, pair), "-o", str(output), "--keep"]
    result = CliRunner().invoke(app, [*arguments, "0.01", "--json"])
    figures = json.loads(result.stdout)
    assert figures["rule"] == "largest:0.01" and figures["nnz"] == SubnetMask.load(output).nnz
    assert 0.009 < figures["density"] < 0.012
    failed = CliRunner().invoke(app, [*arguments, "2"])
    assert failed.exit_code == 2 and "keep must be in" in failed.stderr
