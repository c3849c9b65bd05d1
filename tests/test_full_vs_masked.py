"""The reference comparison: counts that are equal, what each method trains, runs that are kept."""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")

from benchmarks import full_vs_masked, full_vs_masked_run, full_vs_masked_stages
from benchmarks.full_vs_masked_data import character_tokenizer, rows, sum_task
from benchmarks.full_vs_masked_methods import TOLERANCE, all_methods, count
from benchmarks.full_vs_masked_report import MASKED, RIVALS, expected, step_ratios, stored
from benchmarks.full_vs_masked_run import Spec, build, counts_of, run
from benchmarks.full_vs_masked_stages import Bench, companies, key_of
from benchmarks.optimizer import smollm2, storage_bytes
from benchmarks.turns import take_turns
from subnet_ft import SubnetMask
from tests.helpers import snapshot

ROOT = Path(__file__).parents[1]

# A run of the cost stage that took no time to make.
FIGURES: dict[str, Any] = {
    "parameters": 100,
    "trainable": 5,
    "state_bytes": {"weights": 200},
    "peak_bytes": 1000,
    "step_seconds": 1.0,
    "steps_seconds": [1.0],
    "phases": {},
    "checkpoint_bytes": 10,
    "generation_seconds": 1.0,
    "generation_merged_seconds": None,
}
METHODS = {name: m for name, m in all_methods().items() if not m.documented and m.installed}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=14,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    directory = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mask(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    shapes = dict(counts_of(str(model)).linear)
    SubnetMask.synthetic(shapes, 0.1).save(path)
    return path


def spec(model: Path, method: str, mask: Path, **more: Any) -> Spec:
    m = METHODS[method]
    given: dict[str, Any] = {"steps": 2, "warmup": 1, "batch": 8, "accumulation": 1, "threads": 1}
    given |= {"learning_rate": 1e-3 * m.rate, "seed": 0, "mask": str(mask) if m.found else None}
    given |= {"algorithm": m.algorithms[0], "mode": m.modes[-1]}
    return Spec(model=str(model), method=method, **given | more)


def test_methods_of_equal_count_are_equal_on_the_real_shapes() -> None:
    with torch.device("meta"):
        counts = count(LlamaForCausalLM(smollm2()))
    assert counts.parameters == 134_515_008 and counts.linear_parameters == 106_168_320
    assert abs(counts.density / 0.05 - 1) < 0.03  # SHiRA's rank is whole
    masked = sum(round(counts.density * a * b) for a, b in counts.linear.values())
    supertuning = sum(int(a * b * counts.density) for a, b in counts.linear.values())
    for numbers in (masked, supertuning):
        assert abs(numbers / counts.equal - 1) < TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_says_and_nothing_else(
    name, model, mask, tmp_path, monkeypatch
) -> None:
    # A random model gives no right answer; what is rewarded does not matter here.

    def ords(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, c))) for c in completions]

    monkeypatch.setattr(sum_task, "reward", ords)
    method, given = METHODS[name], spec(model, name, mask)
    trainer, _ = build(given, method, tmp_path)  # holds the equal counts to 1%
    before = snapshot(trainer.model)
    trainer.train()
    changed = {
        n: (p != before[n]).sum().item()
        for n, p in trainer.model.named_parameters()
        if not torch.equal(p, before[n])
    }
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(losses) == 2 and torch.tensor(losses).isfinite().all()
    frozen = {n: k for n, k in changed.items() if n not in trained}
    if method.group == "masked":  # in place: values, and the weights that hold them
        entries = sum(before[n].numel() for n in trained)
        assert 0 < sum(frozen.values()) <= entries
        assert set(frozen) <= {f"base_model.model.{n}" for n in counts_of(str(model)).linear}
    else:
        assert not frozen
    assert changed.keys() & trained
    if name == "middle third":
        assert trained == {n for n in before if ".layers.1." in n}
    if name == "full":
        assert trained == set(before)


@pytest.mark.parametrize(
    "name, mode",
    [
        ("full", "fidelity"),
        ("full", "memory"),
        ("masked random 5%", "fidelity"),
        ("masked random 5%", "memory"),
        ("masked found, small state", "memory"),
        ("masked random 5%, small state, released, compact", "memory"),
    ],
)
def test_the_state_is_what_it_should_be(name, mode, model, mask) -> None:
    method = METHODS[name]
    figures = run(spec(model, name, mask, algorithm="sft", mode=mode, steps=3))
    per_parameter = stored(figures) / figures["parameters"]
    dense = {"fidelity": 16, "memory": 8}[mode]
    asked = expected(method, mode, figures) or dense
    assert per_parameter == pytest.approx(asked, rel=0.01)


def test_the_state_misses_no_storage(model, mask, tmp_path, monkeypatch) -> None:
    from benchmarks import full_vs_masked_run

    seen = []
    real = full_vs_masked_run.state_bytes

    def state_bytes(trainer: Any) -> dict[str, int]:
        sizes = real(trainer)
        gc.collect()
        seen.append((sum(sizes.values()), storage_bytes()))
        return sizes

    monkeypatch.setattr(full_vs_masked_run, "state_bytes", state_bytes)
    gc.collect()
    before = storage_bytes()
    run(spec(model, "SHiRA", mask, steps=2))
    counted, alive = seen[-1]
    # What is alive besides: a batch, and what Python has not dropped of the loading.
    assert counted <= alive - before + 1 and alive - before <= 1.1 * counted


def test_phases_add_up_to_the_step(model, mask) -> None:
    figures = run(spec(model, "full, reference precomputed", mask, steps=2))
    assert "reference" not in figures["phases"] and figures["state_bytes"]["reference"] == 0
    figures = run(spec(model, "masked random 5%", mask, algorithm="dpo", steps=2))
    phases = figures["phases"]
    assert {"forward", "backward", "clip", "optimizer", "flush", "reference"} <= set(phases)
    whole = sum(v for name, v in phases.items() if name != "flush")
    assert whole == pytest.approx(figures["step_seconds"], rel=1e-6)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_held_out_rows_are_not_trained_on(algorithm) -> None:
    trained, held_out = rows(algorithm, character_tokenizer(), 200)
    shared = {r["prompt"] for r in trained} & {r["prompt"] for r in held_out}
    assert not shared


def test_a_second_bench_makes_no_run_again(model, tmp_path, monkeypatch, capsys) -> None:
    calls = []

    def child(args: list[str], **kwargs: Any) -> Any:
        given = Spec(**json.loads(Path(args[-2]).read_text()))
        calls.append(given.method)
        if given.method == "SHiRA":
            return subprocess.CompletedProcess(args, 1)
        Path(args[-1]).write_text(json.dumps(run(given)))
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setattr(subprocess, "run", child)
    options = ["--model", str(model), "--algo", "sft", "--rounds", "2", "--steps", "2"]
    options += ["--methods", "full", "masked random 5%", "SHiRA"]
    options += ["full, FlashOptim", "--learn", "masked found 5%", "--accumulated", "full"]
    options += ["--learn-steps", "2", "--seeds", "2", "--trials", "2", "--modes", "memory"]
    options += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path), "--jobs", "1"]
    options += ["--together", "1"]
    monkeypatch.setattr(sys, "argv", ["full_vs_masked", *options])
    full_vs_masked.main()
    first = json.loads((tmp_path / "full_vs_masked_sft.json").read_text())
    # A prior run; two rounds of two methods and one of them accumulated, the failed one once; two
    # trials, a further seed, the base.
    assert len(calls) == 1 + 2 * 3 + 1 + 2 + 1 + 1
    status = {r["method"]: r["status"] for r in first["cost"]}
    assert status["SHiRA"] == "failed" and status["full, FlashOptim"] == "documented"
    assert {p["against"] for p in first["pairs"]} == {"full"}
    for row in first["learning"]:
        assert row["edge"] and row["seeds"] == [0, 1] and len(row["heldout"]) == 2
    calls.clear()
    full_vs_masked.main()
    assert calls == ["SHiRA"]
    second = json.loads((tmp_path / "full_vs_masked_sft.json").read_text())
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_what_is_compared_takes_turns_and_full_is_in_every_company() -> None:
    methods = all_methods()
    cells = [(m, mode, 1) for mode in ("memory", "fidelity") for m in methods.values()]
    cells += [(methods[name], "memory", 16) for name in ("full", MASKED)]
    split = companies(cells, 6)
    assert all(company[0][0].name == "full" and len(company) <= 6 for company in split)
    assert all(len({cell[1:] for cell in company}) == 1 for company in split)
    members = [key_of(cell) for company in split for cell in company[1:]]
    assert sorted(members) == sorted(key_of(c) for c in cells if c[0].name != "full")
    for mode in ("memory", "fidelity"):
        together = [{c[0].name for c in company} for company in split if company[0][1] == mode]
        assert {MASKED, *RIVALS} in together
        assert any(f"{MASKED}, beta 0.04" in t and "SHiRA, beta 0.04" in t for t in together)
    assert companies(cells, 1) and all(len(company) == 1 for company in companies(cells, 1))
    assert companies(cells[:1], 6) == [cells[:1]]


@pytest.mark.parametrize(("own", "modes"), [(True, ["fidelity", "memory"]), (False, ["fidelity"])])
def test_without_products_in_bf16_the_benchmark_computes_in_fp32(
    model, mask, tmp_path, monkeypatch, own, modes
) -> None:
    """What is then many times slower is made where it is asked for."""
    monkeypatch.setattr(full_vs_masked, "multiplies_bf16", lambda: own)
    monkeypatch.setattr(full_vs_masked_run, "multiplies_bf16", lambda: own)
    assert full_vs_masked.parse_options([]).modes == modes
    assert full_vs_masked.parse_options(["--modes", "memory"]).modes == ["memory"]
    trainer, _ = build(spec(model, "full", mask, mode="fidelity"), all_methods()["full"], tmp_path)
    assert trainer.args.bf16 is own
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("own", "modes", "learners", "accumulated"),
    [
        (True, ["fidelity"], 2, {("full", "fidelity", 16)}),
        (False, ["fidelity"], 1, {("full", "fidelity", 16)}),
        (False, ["memory", "fidelity"], 2, {("full", "memory", 16), ("LoRA r=1", "memory", 16)}),
    ],
)
def test_a_bf16_base_is_left_out_without_products_in_bf16_unless_asked_for(
    monkeypatch, own, modes, learners, accumulated
) -> None:
    monkeypatch.setattr(full_vs_masked_stages, "multiplies_bf16", lambda: own)
    bench = Bench.__new__(Bench)
    bench.methods, bench.counts = all_methods(), None  # type: ignore[assignment]
    bench.options = argparse.Namespace(
        modes=modes, methods=["full"], algo="dpo", rounds=1, together=6, batch=4
    )
    bench.options.learn = ["full", f"{MASKED}, small state"]
    bench.options.accumulated = ["full", "LoRA r=1"]
    bench.cost_spec = lambda method, *rest: method.name  # type: ignore[method-assign]
    bench.run_together = lambda specs: [dict(FIGURES) for _ in specs]  # type: ignore[method-assign]
    assert len(bench.learners()) == learners
    rounds, _ = bench.cost()
    assert {key for key in rounds if key[2] == 16} == accumulated


@pytest.mark.parametrize("together", [6, 1])
def test_only_what_is_compared_has_further_rounds(together) -> None:
    """Taking turns, no one always after the same other; alone all, as ratios are of rounds."""
    compared = ["full", MASKED, "SHiRA"]
    names = [*compared, f"{MASKED}, reference precomputed", "DoRA r=16"]
    bench = Bench.__new__(Bench)
    bench.methods, bench.counts = all_methods(), None  # type: ignore[assignment]
    bench.options = argparse.Namespace(
        modes=["memory"], methods=names, algo="dpo", accumulated=[], rounds=3, together=together
    )
    bench.options.batch = 4
    bench.cost_spec = lambda method, *rest: method.name  # type: ignore[method-assign]
    order = []

    def run_together(specs: list[str]) -> list[dict[str, Any]]:
        order.append(specs)
        return [dict(FIGURES) for _ in specs]

    bench.run_together = run_together  # type: ignore[method-assign]
    rounds, _ = bench.cost()
    assert {name: len(runs) for (name, *_), runs in rounds.items()} == {
        name: 3 if together == 1 or name in compared else 1 for name in names
    }
    if together > 1:
        companies_ = [specs for specs in order if set(specs) == set(compared)]
        assert {specs[specs.index(MASKED) - 1] for specs in companies_} == {"full", "SHiRA"}


def test_a_ratio_is_of_runs_in_company() -> None:
    """Each method's full finetuning is that of its own company, not another's."""
    bench = Bench.__new__(Bench)
    pace = {"a": 1.0, "b": 3.0}
    bench.cost_spec = lambda method, *rest: (method.name, rest[-1])  # type: ignore[method-assign]

    def run_together(specs: list[Any]) -> list[dict[str, Any]]:
        slow = pace["b" if "SHiRA" in specs[0][1] else "a"]
        return [{"steps_seconds": [slow * (2 if n == "full" else 1)]} for n, _ in specs]

    bench.run_together = run_together  # type: ignore[method-assign]
    methods, rounds = all_methods(), {}
    full, own, rival = ((methods[name], "memory", 1) for name in ("full", MASKED, "SHiRA"))
    bench.keep_company([full, own], 0, rounds)
    bench.keep_company([full, rival], 0, rounds)
    for cell in (full, own, rival):
        (run_,) = rounds[key_of(cell)]
        expected_ratio = 1.0 if cell is full else 0.5
        assert step_ratios([run_], [run_["full"]]) == [expected_ratio]


CHILD = """
import sys, time
from benchmarks.turns import Turn
turn, (name, steps, log) = Turn(), sys.argv[1:]
for step in range(int(steps)):
    turn.wait()
    print("what a library says does not take a turn", flush=True)
    with open(log, "a") as file:
        file.write(f"{name}{step} ")
        file.flush()
        time.sleep(0.02)
        file.write(". ")
"""


def test_processes_take_turns(tmp_path) -> None:
    """A step each, never two at a time; one that ends, or fails at once, holds up no other."""
    log, pipe = tmp_path / "log", subprocess.PIPE
    wanted = {"a": 3, "b": 1, "broken": "x", "c": 3}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, name, str(steps), str(log)],
            cwd=ROOT,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        for name, steps in wanted.items()
    ]
    take_turns(children)
    assert [child.wait() for child in children] == [0, 0, 1, 0]
    assert log.read_text() == "a0 . b0 . c0 . a1 . c1 . a2 . c2 . "
    for child in children:
        child.stdin.close()
        child.stdout.close()


def test_a_run_in_company_is_built_in_its_turn(model, monkeypatch) -> None:
    """Several at once would wait for one another's threads, minutes where each takes seconds."""
    events = []

    def build_(*args: Any) -> Any:
        events.append("built")
        raise InterruptedError

    monkeypatch.setattr("benchmarks.full_vs_masked_run.build", build_)
    turn = argparse.Namespace(wait=lambda: events.append("waited"))
    monkeypatch.setattr("benchmarks.full_vs_masked_run.Turn", lambda: turn)
    company = ("full", MASKED)
    with pytest.raises(InterruptedError):
        run(Spec(str(model), "sft", "full", "memory", 1, 0, 1, 1, 1e-3, 0, 1, company=company))
    assert events == ["waited", "built"]


def test_an_unknown_method_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        full_vs_masked.parse_options(["--methods", "LoRA r=3"])
    assert "found 'LoRA r=3'" in capsys.readouterr().err
