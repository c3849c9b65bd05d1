"""`subnet-ft train`: TRL's scripts, run as users run them, on models of seconds."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from subnet_ft import SubnetConfig, SubnetMask
from subnet_ft.cli.main import app
from subnet_ft.cli.train import ALGORITHMS, OPTIONS
from tests.helpers import assert_off_mask_untouched, random_mask, snapshot, tiny_llama
from tests.trainers import labelled, preference_dataset, prompts
from tests.training_helpers import text_dataset, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = {
    "sft": text_dataset,
    "dpo": preference_dataset,
    "kto": labelled,
    "grpo": prompts,
    "rloo": prompts,
}
SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
}
GENERATING = {
    "reward_funcs": "tests.trainers.some_reward",
    "num_generations": 2,
    "max_completion_length": 6,
}


def run(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def options(**given: object) -> list[str]:
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train") / "base"
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    mask = random_mask(tiny_llama(), 0.1)
    mask.save(directory / "mask.safetensors")
    return directory


def given_for(algorithm: str, base: Path, tmp_path: Path) -> dict[str, object]:
    kind = "parquet" if algorithm == "kto" else "json"
    data = tmp_path / f"data.{kind}"
    getattr(DATA[algorithm](), f"to_{kind}")(data)
    given = {**SMALL, "model_name_or_path": base, "dataset_name": data, "output_dir": tmp_path}
    if algorithm in ("grpo", "rloo"):
        given |= GENERATING
    return given


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_example_trains(
    algorithm: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EXAMPLES / f"train_{algorithm}.yaml"
    assert f"subnet-ft train {algorithm} --config examples/{config.name}" in config.read_text()
    given = given_for(algorithm, base, tmp_path)
    if "subnet_mask:" in config.read_text():
        given["subnet_mask"] = base / "mask.safetensors"
    result = run(algorithm, "--config", config, *options(**given))
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert caplog.text.count("no mask given: training a random") == ("subnet_mask" not in given)

    trained = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    before, after = snapshot(tiny_llama()), snapshot(trained.get_base_model())
    after = {name: after[name] for name in before}
    moved = {name: (before[name] != after[name]).flatten().nonzero().flatten() for name in before}
    mask = SubnetMask(moved, {name: tuple(w.shape) for name, w in before.items()})
    if algorithm in ("dpo", "grpo"):
        chosen = SubnetMask.load(base / "mask.safetensors")
        assert mask.nnz > chosen.nnz / 2
        assert_off_mask_untouched(before, after, chosen)
    else:
        layers = {"self_attn"} if algorithm == "kto" else {"self_attn", "mlp"}
        assert {name.split(".")[3] for name in mask} == layers
        share = {"sft": 0.02, "kto": 0.05, "rloo": 0.02}[algorithm]
        largest = max(len(mask[name]) / before[name].numel() for name in mask)
        assert share / 2 < largest <= share * 1.05


def test_bf16_values_bring_their_optimizer(base: Path, tmp_path: Path) -> None:
    given = {**given_for("sft", base, tmp_path), "dtype": "bfloat16"}
    result = run("sft", *options(**given, subnet_values_dtype="bfloat16"))
    assert result.exit_code == 0, (result.stderr, result.exception)
    values = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.dtype for n, v in values.items() if n.endswith("weight")} == {torch.bfloat16}


def test_help() -> None:
    listed = run("--help").stdout
    assert all(f"{name} " in listed for name in ALGORITHMS)
    text = run("sft", "--help").stdout
    assert "--max_steps" in text and "\nsubnet:" in text
    assert all(f"--subnet_{name} " in text for name in ("mask", *OPTIONS))


def test_options_are_all_of_the_config_s() -> None:
    peft_s = {f.name for f in fields(peft.PeftConfig)}
    own = {
        f.name
        for f in fields(SubnetConfig)
        if f.name not in peft_s and f.metadata["help"] != "Not used."
    }
    assert own - set(OPTIONS) == {"trainable_token_indices", "bias", "init_weights"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_peft": True}, "--use_peft: expected one adapter, found LoRA"),
        ({"model_name_or_path": ""}, "--model_name_or_path: expected a model"),
        ({"dataset_name": ""}, "--dataset_name: expected a data file"),
        ({"dataset_name": __file__}, "--dataset_name: expected one of .json"),
        ({"dataset_name": "no/such"}, "no/such"),
        ({"subnet_density": 2}, "density: expected a share"),
        ({"subnet_density": "much"}, "argument --subnet_density"),
        ({"subnet_mask": "absent.safetensors"}, "absent.safetensors"),
        ({"max_stepz": 3}, "max_stepz"),
        ({"config": "absent.yaml"}, "absent.yaml"),
    ],
)
def test_bad_input_is_one_line(more: dict, message: str, base: Path, tmp_path: Path) -> None:
    result = run("sft", *options(**(given_for("sft", base, tmp_path) | more)))
    assert result.exit_code == 2, result.exception
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and result.stderr.rstrip().endswith(line)


def test_options_of_a_selector_beside_a_mask(base: Path, tmp_path: Path) -> None:
    given = given_for("sft", base, tmp_path)
    given |= {"subnet_mask": base / "mask.safetensors", "subnet_density": 0.1}
    result = run("sft", *options(**given))
    assert result.exit_code == 2 and "--subnet_mask, --subnet_density" in result.stderr
    assert run("sft", "--config").exit_code == 2


def test_a_bad_config_file(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("[", "- 1\n", "no_such_option: 1\n"):
        file.write_text(text)
        result = run("sft", "--config", file, *options(**given_for("sft", base, tmp_path)))
        assert result.exit_code == 2, text
        assert result.stderr.splitlines()[-1].startswith("error: ")


def test_without_trl(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['trl'] = None; sys.argv = ['subnet-ft', 'train', 'sft'];"
        "from subnet_ft.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and "pip install 'subnet-ft[trl]'" in result.stderr
