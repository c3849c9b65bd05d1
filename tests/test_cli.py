import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from subnet_ft import __version__
from subnet_ft.cli.main import app
from subnet_ft.mask import SubnetMask
from tests.checkpoint_helpers import (
    save_directory,
    save_sharded,
    save_subnet_adapter,
    save_weights,
    tiny_llama,
    tuned_from,
)

NAME = "model.layers.0.mlp.up_proj.weight"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = tiny_llama()
    return (
        save_directory(base, tmp_path / "base"),
        save_directory(tuned_from(base), tmp_path / "tuned"),
    )


@pytest.fixture
def adapter(tmp_path: Path, pair) -> Path:
    weights = dict(tiny_llama().state_dict())
    changes = {NAME: (torch.tensor([3, 500]), torch.tensor([1.0, 2.0]))}
    return save_subnet_adapter(tmp_path / "adapter", weights, changes)


def test_extract_inspect_compare_merge_as_json(pair, adapter, tmp_path: Path):
    mask, paper = tmp_path / "mask.safetensors", tmp_path / "paper.safetensors"
    extracted = json.loads(run("extract", *pair, "-o", mask, "--json").stdout)
    loaded = SubnetMask.load(mask)
    assert extracted["nnz"] == loaded.nnz == extracted["changed"]["bitwise"]
    assert extracted["density"] == loaded.density
    selected = ("--rule", "abs:1e-5", "--include", r"model\..*", "--exclude", ".*norm.*")
    other = json.loads(run("extract", *pair, "-o", paper, *selected, "--json").stdout)
    assert other["nnz"] == other["changed"]["abs:1e-5"] and other["rule"] == "abs:1e-5"
    again = run("extract", *pair, "-o", paper, "--overwrite", "--rule", "abs:1e-5", "--json")
    assert again.exit_code == 0

    inspected = json.loads(run("inspect", mask, "--json").stdout)
    assert inspected["overall"]["nnz"] == loaded.nnz
    assert {entry["label"] for entry in inspected["by_layer"]} == {"other", "0", "1"}
    assert inspected["overall"]["changed_density"].keys() == {"bitwise", "abs:1e-5"}
    for where in (adapter, adapter / "adapter_model.safetensors"):
        assert json.loads(run("inspect", where, "--json").stdout)["overall"]["nnz"] == 2

    compared = json.loads(run("compare", mask, paper, "--json").stdout)
    assert compared["pairs"][0]["o2"] == 1.0 and len(compared["masks"]) == 2

    merged = run("merge", pair[0], adapter, "-o", tmp_path / "merged", "--json")
    assert json.loads(merged.stdout)["changed_parameters"] == 1
    assert run("extract", pair[0], tmp_path / "merged", "-o", tmp_path / "back").exit_code == 0
    assert SubnetMask.load(tmp_path / "back")[NAME].tolist() == [3, 500]


def test_tables_for_people(pair, adapter, tmp_path: Path):
    mask, twin = tmp_path / "mask.safetensors", tmp_path / "twin.safetensors"
    results = [
        run("extract", *pair, "-o", mask),
        run("extract", *pair, "-o", twin, "--rule", "abs:1e-5"),
        run("inspect", mask),
        run("inspect", adapter),
        run("compare", mask, twin),
        run("merge", pair[0], adapter, "-o", tmp_path / "merged"),
    ]
    for result in results:
        assert result.exit_code == 0, result.output
        assert not result.stderr
    for word in ("by layer", "by matrix type", "densest", "sparsest", "bitwise", "abs:1e-5"):
        assert word in results[2].stdout
    assert run("--version").stdout == f"subnet-ft {__version__}\n"


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def with_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def bad_weights(work: Path, name: str, change) -> Path:
    weights = {key: weight.detach().clone() for key, weight in tiny_llama().named_parameters()}
    change(weights)
    return save_weights(work / name, weights, tie_word_embeddings=True)


def missing_shard(work: Path) -> list[object]:
    save_sharded(tiny_llama(), work / "sharded")
    next((work / "sharded").glob("model-00002*")).unlink()
    return ["extract", work / "base", work / "sharded", "-o", work / "out"]


def truncated(work: Path) -> list[object]:
    damage(work / "tuned" / "model.safetensors", lambda data: data[:-100])
    return ["extract", work / "base", work / "tuned", "-o", work / "out"]


def edited(change) -> Callable[[Path], list[object]]:
    def case(work: Path) -> list[object]:
        return ["extract", work / "base", bad_weights(work, "bad", change), "-o", work / "out"]

    return case


def pickled(work: Path) -> list[object]:
    (work / "pickled").mkdir()
    (work / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Path}))
    return ["extract", work / "base", work / "pickled", "-o", work / "out"]


def existing_output(work: Path) -> list[object]:
    return ["extract", work / "base", work / "tuned", "-o", work / "mask"]


def corrupted_mask(work: Path) -> list[object]:
    damage(work / "mask", lambda data: data.replace(b"subnet_mask", b"subnet_mosk"))
    return ["inspect", work / "mask"]


def corrupted_indices(work: Path) -> list[object]:
    SubnetMask({"w": torch.tensor([1, 2])}, {"w": (500,)}).save(work / "small")
    SubnetMask({"w": torch.tensor([1, 2])}, {"w": (500,)}).save(work / "twin")
    damage(work / "small", lambda data: data[:-8] + data[-4:] + data[-8:-4])
    return ["compare", work / "small", work / "twin"]


def other_model(work: Path) -> list[object]:
    SubnetMask({"w": torch.tensor([1])}, {"w": (5,)}).save(work / "other")
    return ["compare", work / "mask", work / "other"]


def edited_base(work: Path) -> list[object]:
    other = bad_weights(work, "other", lambda weights: weights[NAME].view(-1)[3:4].add_(1))
    return ["merge", other, work / "adapter", "-o", work / "out"]


def other_adapter(work: Path) -> list[object]:
    with_config(work / "adapter", peft_type="IA3")
    return ["merge", work / "base", work / "adapter", "-o", work / "out"]


def lost_header(work: Path) -> list[object]:
    file = work / "adapter" / "adapter_model.safetensors"
    damage(file, lambda data: data.replace(b"subnet_ft_header", b"subnet_ft_heeder"))
    return ["inspect", work / "adapter"]


def command(*arguments: str) -> Callable[[Path], list[object]]:
    """Arguments that begin with @ are paths in the working directory."""

    def case(work: Path) -> list[object]:
        return [work / a[1:] if a.startswith("@") else a for a in arguments]

    return case


EXTRACT = ("extract", "@base", "@tuned", "-o", "@out")
BAD_INPUT = {
    "missing shard": (missing_shard, "expected this shard"),
    "truncated file": (truncated, "complete safetensors file"),
    "integer weights": (edited(lambda w: w.update({NAME: w[NAME].char()})), "got int8"),
    "float8 weights": (
        edited(lambda w: w.update({NAME: w[NAME].to(torch.float8_e5m2)})),
        "got F8_E5M2",
    ),
    "shape mismatch": (edited(lambda w: w.update({NAME: w[NAME][:5].clone()})), "one shape"),
    "missing parameter": (edited(lambda w: w.pop(NAME)), "expected in both"),
    "resized embeddings": (
        edited(lambda w: w.update({"model.embed_tokens.weight": torch.ones(100, 32)})),
        "resized",
    ),
    "nan": (edited(lambda w: w[NAME].view(-1)[5:6].fill_(math.nan)), "found nan"),
    "infinity": (edited(lambda w: w[NAME].view(-1)[5:6].fill_(-math.inf)), "found -inf"),
    "unknown experts": (
        edited(lambda w: w.update({"model.layers.0.mlp.experts.0.w1.weight": torch.ones(2)})),
        "layout is not known",
    ),
    "pickled file": (pickled, "tensors only"),
    "existing output": (existing_output, "does not exist, found one"),
    "nothing changed": (command("extract", "@base", "@base", "-o", "@out"), "none of"),
    "unknown rule": (command(*EXTRACT, "--rule", "close"), "rule must be"),
    "bad regular expression": (command(*EXTRACT, "--include", "(q"), "regular expression"),
    "pattern without a match": (command(*EXTRACT, "--exclude", "q_proj"), "got no match"),
    "no such path": (command("extract", "@base", "@nowhere", "-o", "@out"), "no such path"),
    "no such directory": (
        command("extract", "@base", "@tuned", "-o", "@no/out"),
        "existing directory",
    ),
    "corrupted mask": (corrupted_mask, "'format' must be 'subnet_mask'"),
    "corrupted indices": (corrupted_indices, "strictly increasing"),
    "no mask": (command("inspect", "@tuned/config.json"), "expected a mask file"),
    "mask of another model": (other_model, "same base model"),
    "one mask only": (command("compare", "@mask"), "at least two"),
    "adapter over an edited base": (edited_base, "other base values"),
    "another kind of adapter": (other_adapter, "found IA3"),
    "adapter without header": (lost_header, "subnet_ft_header"),
    "merge of no adapter": (
        command("merge", "@base", "@tuned", "-o", "@out"),
        "expected an adapter directory",
    ),
    "merge into an existing directory": (
        command("merge", "@base", "@adapter", "-o", "@tuned"),
        "does not exist, found one",
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input(kind: str, pair, adapter, tmp_path: Path):
    assert run("extract", *pair, "-o", tmp_path / "mask").exit_code == 0
    prepare, message = BAD_INPUT[kind]
    arguments = prepare(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert message in result.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("arguments", [["extract", "a"], ["unknown"], ["inspect", "--no-such"]])
def test_usage_errors_exit_alike(arguments: list[str]):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("what", ["extract", "merge"])
def test_nothing_slow_is_imported(what: str, pair, adapter, tmp_path: Path):
    arguments = {
        "extract": ["extract", *pair, "-o", tmp_path / "mask"],
        "merge": ["merge", pair[0], adapter, "-o", tmp_path / "merged"],
    }[what]
    script = (
        "import sys\n"
        "from subnet_ft.cli.main import app\n"
        f"try:\n    app({[str(a) for a in arguments]!r})\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'transformers', 'peft', 'accelerate', 'triton', 'huggingface_hub'}\n"
        # Importing torch would take longer than comparing two small models.
        f"loaded |= {{'torch'}} if {what == 'extract'} else set()\n"
        "print('LOADED', sorted(loaded & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
