"""`subnet_ft.plan`: a trace says what a real step holds, a short one what a complete one says."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, ViTConfig
from typer.testing import CliRunner

from benchmarks.common import transient_bytes
from subnet_ft.cli.main import app
from subnet_ft.errors import ConfigError, UnsupportedError
from subnet_ft.plan import comparison, footprint, search, steps
from subnet_ft.plan.methods import Method
from subnet_ft.plan.models import PRESETS, load_config, with_layers
from subnet_ft.plan.steps import Setting

SMALL = Method("masked", density=0.1, state="8bit")
METHODS = [
    Method("masked", density=0.1),
    Method("masked", density=0.1, weight_grad="compact"),
    SMALL,
    replace(SMALL, released=True),
    Method("lora", rank=4),
    Method("full"),
    Method("full", weights=torch.float32),
    Method("sgd"),
]
DPO = Setting("dpo", 1, 16, reference=True)
# Published counts, of the models' pages and papers.
PARAMETERS = {
    "Qwen3-8B": 8_190_735_360,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen3-30B-A3B": 30_532_122_624,
    "SmolLM2-135M": 134_515_008,
}

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(layers: int = 2, **options: object) -> LlamaConfig:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**{**sizes, "num_hidden_layers": layers, **options})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_stays_is_a_real_steps_to_the_byte(method: Method):
    traced = footprint.trace(tiny(), method, DPO)
    model, reference, optimizer = footprint.build(tiny(), method, DPO, "cpu")
    held: list[int] = []

    def enter(phase: str) -> None:
        if phase == "step" and method.clips:
            held.append(footprint.storage_bytes(p.grad for p in model.parameters()))

    steps.run(DPO, model, reference, optimizer, enter, clips=method.clips)
    assert footprint.state_of(model, reference, optimizer) == traced.state
    assert traced.gradients == (held[0] if method.clips else 0)
    assert traced.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[4], METHODS[5]], ids=lambda m: m.name)
def test_the_peak_is_a_real_steps(method: Method):
    setting = Setting("sft", 2, 64, checkpointing=False)
    config = tiny(vocab_size=1024)  # the output head's tile is the same for any model
    traced = footprint.trace(config, method, setting, "cpu")
    model, reference, optimizer = footprint.build(config, method, setting, "cpu")
    footprint.first_step([p for p in model.parameters() if p.requires_grad], optimizer)
    step = partial(steps.run, setting, model, reference, optimizer, lambda phase: None)
    measured = transient_bytes(partial(step, clips=method.clips))
    assert traced.peak - sum(traced.state.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3], METHODS[6]], ids=lambda m: m.name)
def test_two_depths_say_what_all_layers_do(method: Method):
    whole = footprint.trace(tiny(7), method, DPO)
    short = footprint.trace_short(tiny(7), method, DPO)
    assert short.peak == whole.peak and short.parts() == whole.parts()
    assert all(whole.peaks[place] == amounts for place, amounts in short.peaks.items())
    assert replace(short, peaks={}) == replace(whole, peaks={})


def test_layers_that_differ_are_all_traced():
    assert footprint.alike(tiny(6))
    mixed = load_config("Qwen3-30B-A3B")
    for name, value in {
        "vocab_size": 96,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 6,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mlp_only_layers": [5],
    }.items():
        setattr(mixed, name, value)
    assert not footprint.alike(mixed)
    method, setting = Method("masked", density=0.1), Setting("sft", 1, 16)
    whole = footprint.trace(mixed, method, setting)
    assert footprint.trace_short(mixed, method, setting) == whole
    experts = 5 * 4 * 3 * 64 * 32  # of five layers; gate, up and down
    attention = 6 * 2 * (64 * 64 + 64 * 32)
    assert whole.trained == pytest.approx(0.1 * (experts + attention + 3 * 64 * 96), rel=0.01)


def test_attention_scores_do_not_exist_and_the_cache_is_counted():
    config = tiny(2, num_attention_heads=8)
    peaks = [
        footprint.trace(config, Method("full"), Setting("sft", 1, n, checkpointing=False)).peak
        for n in (1024, 2048, 4096)
    ]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.1)
    grpo = footprint.trace(config, Method("lora", rank=4), Setting("grpo", 4, 64))
    assert grpo.cache == 4 * 64 * 2 * 2 * 2 * 8 * 2  # rows, tokens, k and v, layers, heads, size
    assert ("generate", 0) in grpo.peaks and ("reference", 0) not in grpo.peaks


def test_the_largest_density_fits_and_the_next_does_not():
    config, method = tiny(1, hidden_size=512, intermediate_size=512), Method("masked", density=0.5)
    setting = Setting("sft", 1, 16)
    lines = search.draw_lines(config, method, setting)
    limit = footprint.trace_short(config, method.at(0.3), setting).peak
    found = search.largest_density(config, method, setting, lines, limit)
    assert found is not None and found[1].peak <= limit
    assert found[0] == pytest.approx(0.3, abs=2 / search.GRAIN)
    denser = footprint.trace_short(config, method.at(found[0] + 10 / search.GRAIN), setting)
    assert denser.peak > limit
    assert search.largest_density(config, method, setting, lines, limit // 10) is None
    assert lines.densest(limit * 100) == 1.0


def test_a_budget_leaves_a_margin():
    assert search.budget(24) == int(24 * 2**30 * 0.96) - 2**30
    with pytest.raises(ConfigError, match="more than 1 GiB"):
        search.budget(1)


def test_presets_have_the_published_count():
    for name, count in PARAMETERS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(name.lower()))
        assert sum(p.numel() for p in model.parameters()) == count, name
    assert set(PARAMETERS) == set(PRESETS)


def test_with_layers_keeps_kinds_of_layers():
    config = with_layers(load_config("Qwen3-8B"), 3)
    assert config.num_hidden_layers == 3 and len(config.layer_types) == 3


def test_plan_as_json(directory: Path):
    result = run(
        directory, "--algo", "dpo", "--density", 0.05, "--gpu", 2, "--length", 16, "--json"
    )
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    for row in plan["rows"]:
        assert sum(row["bytes"].values()) == row["peak_bytes"]
        assert row["fits"] == (row["peak_bytes"] <= plan["usable_bytes"])
    references = {row["reference"] for row in plan["rows"]}
    assert references == {"adapter off", "second model", "precomputed"}
    assert [fit["density"] for fit in plan["largest_density"]] == [1.0, 1.0]
    less = plan["largest_density"][0]["as_little"]
    assert set(less) == {
        "LoRA r=16",
        "LoRA r=64",
        "full, SGD, released gradients, reference precomputed",
    }
    assert all(name in plan["sentence"] for name in less)
    assert less["LoRA r=16"] < less["LoRA r=64"]


def test_plan_as_a_table(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison, "RIVALS", comparison.RIVALS[:1])
    result = run(directory, "--gpu", 2, "--length", 16)
    assert result.exit_code == 0, result.output
    for expected in ("masked 0.02", "LoRA r=16", "GiB", "Assumed"):
        assert expected in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algo", "ppo"), "algo: expected one of"),
        (("--density", 0), "density: expected a share"),
        (("--gpu", 0.5), "more than 1 GiB"),
        (("--batch", 0), "a batch of at least 1"),
        (("--reference",), "found sft, which has none"),
    ],
)
def test_bad_input_is_one_line(directory: Path, arguments: tuple[object, ...], message: str):
    result = run(directory, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_unknown_and_unfit_models(tmp_path: Path):
    result = run(tmp_path / "nothing")
    assert result.exit_code == 2 and "expected a preset" in result.stderr
    ViTConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedError, match="causal language model"):
        load_config(str(tmp_path / "other"))
    tiny(quantization_config={"quant_method": "bitsandbytes"}).save_pretrained(tmp_path / "nf4")
    with pytest.raises(UnsupportedError, match="quantized"):
        load_config(str(tmp_path / "nf4"))
