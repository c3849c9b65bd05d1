import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from subnet_ft.analysis.density import overall_density
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import CheckpointError, ConfigError, MaskMismatchError
from subnet_ft.extract import extract_mask
from subnet_ft.extract.rules import Rule, comparison_dtype
from subnet_ft.mask import SubnetMask
from subnet_ft.mask_file import checksum
from subnet_ft.storage.arrays import bf16_bits, to_array, to_tensor
from tests.checkpoint_helpers import (
    FORMS,
    paper_counts,
    save_directory,
    save_subnet_adapter,
    save_weights,
    tiny_llama,
    tuned_from,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_counts_are_the_papers_in_every_form(form: str, tied: bool, tmp_path: Path):
    base = tiny_llama(tied)
    tuned = tuned_from(base)
    exact, beyond, total = paper_counts(base, tuned)
    assert 0 < beyond < exact < total
    paths = [FORMS[form](m, tmp_path / side) for side, m in (("base", base), ("tuned", tuned))]
    bitwise = extract_mask(*paths, chunk=640)
    paper = extract_mask(*paths, "abs:1e-5", output=tmp_path / "mask.safetensors", chunk=8)
    assert (bitwise.nnz, paper.nnz, bitwise.numel) == (exact, beyond, total)
    for mask in (bitwise, paper):
        assert overall_density(mask).changed == {"bitwise": exact, "abs:1e-5": beyond}
    assert (paper - bitwise).nnz == 0


def test_indices_and_checksums_are_those_of_the_weights(tmp_path: Path):
    base = tiny_llama(dtype=torch.float32)
    tuned = tuned_from(base)
    mask = extract_mask(
        save_directory(base, tmp_path / "base"), save_directory(tuned, tmp_path / "tuned"), chunk=72
    )
    others = dict(tuned.named_parameters())
    for name, parameter in base.named_parameters():
        changed = (parameter.bfloat16() != others[name].bfloat16()).view(-1).nonzero().view(-1)
        assert torch.equal(mask[name].long() if name in mask else torch.tensor([]).long(), changed)
        if len(changed):
            assert mask.checksums[name] == checksum(parameter.view(-1)[changed])


def test_forms_may_differ_between_the_sides(tmp_path: Path):
    base = tiny_llama()
    tuned = tuned_from(base)
    reference = extract_mask(
        save_directory(base, tmp_path / "base"), save_directory(tuned, tmp_path / "tuned")
    )
    for form, save in FORMS.items():
        assert extract_mask(tmp_path / "base", save(tuned, tmp_path / form)) == reference


@pytest.mark.filterwarnings("ignore")
def test_lora_adapter_as_the_tuned_side(tmp_path: Path):
    base = tiny_llama()
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "lora")
    exact, beyond, _ = paper_counts(base, adapted.merge_and_unload())
    mask = extract_mask(save_directory(base, tmp_path / "base"), tmp_path / "lora", chunk=64)
    assert overall_density(mask).changed == {"bitwise": exact, "abs:1e-5": beyond}
    assert set(mask) == {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}


def test_our_adapter_as_the_tuned_side(tmp_path: Path):
    weights = {"a.weight": torch.randn(40, 9).bfloat16()}
    base = save_weights(tmp_path / "base", weights)
    indices = torch.tensor([0, 77, 359])
    adapter = save_subnet_adapter(
        tmp_path / "adapter", weights, {"a.weight": (indices, torch.tensor([5.0, 6.0, 7.0]))}
    )
    assert extract_mask(base, adapter, chunk=8)["a.weight"].tolist() == [0, 77, 359]


TIE = float(torch.tensor(1e-5).bfloat16())  # the tolerance as the paper's script rounds it
STEP = float(torch.finfo(torch.bfloat16).smallest_normal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_patterns_of_bits_against_the_papers_formula(dtype: torch.dtype):
    """Signed zeros, denormals, the threshold and its neighbours, extremes."""
    special = [0.0, -0.0, TIE, -TIE, 1e-5, 2e-5, STEP, STEP / 2, -STEP / 4, 1.0, -1.0, 1.0078125]
    special += [TIE * (1 + 2**-7), TIE * (1 - 2**-8), 65504.0, -65504.0, 6e-8, 1e-5 * 1.5]
    values = torch.tensor(special).to(dtype)
    base, tuned = (side.reshape(-1) for side in torch.meshgrid(values, values, indexing="ij"))
    compared = torch.float16 if dtype == torch.float16 else torch.bfloat16
    a, b = base.to(compared), tuned.to(compared)
    for rule, expected in [
        ("bitwise", a != b),
        ("abs:1e-5", ~torch.isclose(b - a, torch.zeros_like(a), atol=1e-5)),
        ("abs:1e-8", ~torch.isclose(b - a, torch.zeros_like(a), atol=1e-8)),
        ("abs:0", ~torch.isclose(b - a, torch.zeros_like(a), atol=0)),
    ]:
        changes = Rule.parse(rule).changes(to_array(base), to_array(tuned))
        assert changes.bits.tolist() == expected.tolist(), rule
        assert changes.where.tolist() == expected.nonzero().view(-1).tolist()
        assert torch.equal(to_tensor(changes.values, "bfloat16"), base[expected].bfloat16())
        assert changes.bitwise == int((a != b).sum())


def test_every_pair_of_random_bf16_patterns():
    bits = torch.randint(-(2**15), 2**15, (2, 200_000)).to(torch.int16).view(torch.bfloat16)
    base, tuned = bits.masked_fill(~bits.isfinite(), 0.5)
    assert torch.equal(
        torch.from_numpy(Rule.parse("abs:1e-5").changes(to_array(base), to_array(tuned)).bits),
        ~torch.isclose(tuned - base, torch.zeros_like(base), atol=1e-5),
    )


def test_rounding_to_bf16_is_torch_s():
    bits = torch.randint(-(2**31), 2**31 - 1, (400_000,), dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[~values.isnan()]
    assert torch.equal(to_tensor(bf16_bits(values.numpy()), "bfloat16"), values.bfloat16())


def test_comparison_dtypes():
    half, brain, single = (np.dtype(name) for name in ("float16", "uint16", "float32"))
    pairs = [(brain, brain), (single, brain), (single, single), (half, half), (half, single)]
    pairs += [(half, brain)]
    assert [comparison_dtype(*pair) for pair in pairs] == [brain] * 3 + [half] * 2 + [single]
    assert [comparison_dtype(*pair[::-1]) for pair in pairs] == [brain] * 3 + [half] * 2 + [single]


@pytest.mark.parametrize("side", ["base", "tuned", "both"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("output", [None, "mask.safetensors"])
def test_values_that_are_not_finite(side: str, value: float, output, tmp_path: Path):
    weights = {"a.weight": torch.randn(9, 9), "b.weight": torch.randn(50)}
    for name in ("base", "tuned"):
        mine = {key: weight + (name == "tuned") for key, weight in weights.items()}
        if side in (name, "both"):
            mine["b.weight"][33] = value
        save_weights(tmp_path / name, mine)
    where = {"output": tmp_path / output} if output else {}
    if side == "both" and value == math.inf:
        # Equal infinities are no change, and nothing that was changed is infinite.
        assert 33 not in extract_mask(tmp_path / "base", tmp_path / "tuned")["b.weight"]
        return
    with pytest.raises(CheckpointError, match=f"^b.weight: expected finite.*found {value}"):
        extract_mask(tmp_path / "base", tmp_path / "tuned", **where)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


def test_include_exclude_and_metadata(tmp_path: Path):
    base = tiny_llama()
    save_directory(base, tmp_path / "base")
    FORMS["trainer checkpoint"](tuned_from(base), tmp_path / "tuned")
    mask = extract_mask(
        tmp_path / "base", tmp_path / "tuned", include=r".*_proj\.weight", exclude=r".*layers\.0.*"
    )
    assert all("layers.1" in name and "_proj" in name for name in mask.shapes)
    assert len(mask.shapes) == 7
    assert mask.metadata == {
        "base_model": str(tmp_path / "base"),
        "source": str(tmp_path / "tuned"),
        "rule": "bitwise",
        "precision": "bfloat16",
        "compared_in": "bfloat16",
        "steps": "40",
        "learning_rate": "1e-06",
    }


def test_skipped_tensors_are_in_the_metadata(tmp_path: Path):
    save_directory(tiny_llama(), tmp_path / "base")
    FORMS["tied head stored"](tuned_from(tiny_llama()), tmp_path / "tuned")
    mask = extract_mask(tmp_path / "base", tmp_path / "tuned")
    assert "position_ids" in mask.metadata["skipped"]


def test_temporary_file_goes_with_the_mask(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    base = tiny_llama()
    save_directory(base, tmp_path / "base")
    save_directory(tuned_from(base), tmp_path / "tuned")
    mask = extract_mask(tmp_path / "base", tmp_path / "tuned")
    part = mask.filter(r".*q_proj.*")
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    mask.save(tmp_path / "kept.safetensors")
    assert SubnetMask.load(tmp_path / "kept.safetensors") == mask
    del mask
    assert part.nnz and part["model.layers.0.self_attn.q_proj.weight"].numel()
    del part
    assert not list((tmp_path / "temporary").iterdir())


def test_output_rules(tmp_path: Path):
    base = tiny_llama()
    pair = save_directory(base, tmp_path / "base"), save_directory(tuned_from(base), tmp_path / "t")
    output = tmp_path / "mask.safetensors"
    output.write_text("precious")
    with pytest.raises(ConfigError, match="does not exist"):
        extract_mask(*pair, output=output)
    assert output.read_text() == "precious"
    with pytest.raises(ConfigError, match="existing directory"):
        extract_mask(*pair, output=tmp_path / "no" / "mask")
    assert extract_mask(*pair, output=output, overwrite=True) == SubnetMask.load(output)
    for rule in ("exact", "abs", "abs:", "abs:x", "abs:-1", "abs:nan", "abs:inf"):
        with pytest.raises(ConfigError, match="rule must be"):
            extract_mask(*pair, rule)
    with pytest.raises(ConfigError, match="multiple of 8"):
        extract_mask(*pair, chunk=12)


def test_identical_checkpoints(tmp_path: Path):
    path = save_directory(tiny_llama(), tmp_path / "base")
    with pytest.raises(MaskMismatchError, match=r"none of .* weights changed"):
        extract_mask(path, path, output=tmp_path / "mask")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.ones(4, 2)}, "^a: expected one shape"),
        ({"b": torch.ones(4)}, "^a: expected in both checkpoints"),
        ({"a": torch.ones(4), "b": torch.ones(4)}, "^b: expected in both checkpoints"),
    ],
)
def test_checkpoints_of_different_models(other: dict, message: str, tmp_path: Path):
    base = save_weights(tmp_path / "base", {"a": torch.ones(4)})
    with pytest.raises(CheckpointError, match=message):
        extract_mask(base, save_weights(tmp_path / "tuned", other))


def test_threads_are_given_back(tmp_path: Path):
    threads = torch.get_num_threads()
    base = save_weights(tmp_path / "base", {"a": torch.zeros(4)})
    extract_mask(base, save_weights(tmp_path / "tuned", {"a": torch.ones(4)}))
    assert torch.get_num_threads() == threads
    assert open_checkpoint(base).read("a").tolist() == [0.0] * 4
