"""benchmarks.scaling and benchmarks.extract: fits, expected formulas on tiny models, counts."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import extract, scaling
from benchmarks.common import fit, transient_bytes
from benchmarks.scaling_laws import adapter_file, first_sync, laws, masked_state
from subnet_ft import extract_mask

TINY = scaling.Settings(
    {"small": scaling.llama(64, 96, 2, 4, 512), "large": scaling.llama(128, 192, 2, 4, 512, kv=2)},
    middle="small",
    densities=(0.01, 0.1, 1.0),
    tokens=(1, 8),
    lengths=(8, 16),
)


def test_a_line_is_found_with_its_slope_and_intercept() -> None:
    line = fit("y", "x", [(x, 3 * x + 5) for x in (1, 2, 7)], expected=3.0)
    assert (line["slope"], line["intercept"]) == (pytest.approx(3), pytest.approx(5))
    assert line["r2"] == pytest.approx(1) and line["expected"] == 3.0
    power = fit("y", "x", [(x, 2 * x**1.5) for x in (1, 10, 1000)], logarithmic=True)
    assert (power["slope"], power["intercept"]) == (pytest.approx(1.5), pytest.approx(math.log(2)))
    flat = fit("y", "x", [(1, 4), (2, 4)])
    assert flat["slope"] == 0 and flat["r2"] is None


def test_transient_bytes_is_the_most_that_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8)
        first, second = (torch.empty(1 << 20, dtype=torch.uint8) for _ in range(2))
        assert first.nbytes == second.nbytes

    assert transient_bytes(run) == 2 << 20


def test_formulas_bend_where_a_bitmap_is_smaller() -> None:
    assert adapter_file(0.01) == pytest.approx(0.08) and first_sync(0.01) == pytest.approx(0.06)
    assert adapter_file(1 / 32) == pytest.approx(0.25)
    assert adapter_file(1.0) == 4.125 and masked_state(1.0) == 28.0


@pytest.fixture(scope="module")
def results() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "ROUNDS", 1)
        patch.setattr(extract, "BLOCK", 1 << 14)
        return scaling.measure(TINY)


def test_measured_bytes_are_the_formulas(results: dict) -> None:
    for row in results["density"]:
        count, density, side = row["parameters"], row["density"], row["masked"]
        # A few scalars of the optimizer a tensor; rounding of counts.
        assert side["state_bytes"] == pytest.approx(count * masked_state(density), rel=0.02)
        assert side["sync_bytes"] == pytest.approx(count * first_sync(density), rel=0.02)
        assert side["sync_values_bytes"] == 2 * side["trained"]
        header = 1024 * 21  # at most 1 KiB a tensor; DESIGN.md says half of that
        assert 0 < side["file_bytes"] - count * adapter_file(density) < header
        assert row["full"]["state_bytes"] == pytest.approx(8 * count, rel=0.01)
        assert row["full"]["gradient_bytes"] == 2 * count
        for one in (side, row["full"]):
            assert one["peak_bytes"] > one["state_bytes"] - one["gradient_bytes"]


def test_every_sweep_is_measured_beside_full(results: dict) -> None:
    assert [row["model"] for row in results["size"]] == ["small", "large"]
    assert [row["length"] for row in results["length"]] == [8, 16]
    for row in (*results["size"], *results["density"], *results["length"]):
        assert row["full"]["ratio"] == 1.0 and row["masked"]["ratio"] > 0
    for row in results["size"]:
        assert row["in_turn"] and row["extraction"]["seconds"] > 0
        assert row["extraction"]["bytes_a_side"] >= 2 * row["parameters"]
    json.dumps(results)


def test_laws_come_from_the_rows_alone(results: dict) -> None:
    assert laws(results) == results["fits"]
    slopes = {(f["sweep"], f["what"]): f for f in results["fits"]}
    for key in (
        ("size", "state, masked, bytes"),
        ("size", "state, full, bytes"),
        ("size", "later sync, masked, bytes"),
        ("density", "state, bytes a parameter"),
        ("density", "first sync, bytes a parameter"),
    ):
        assert slopes[key]["slope"] == pytest.approx(slopes[key]["expected"], rel=0.02), key
    # Operations are linear in length but for attention's square.
    passes = slopes["length", "forward and backward, masked, ms"]
    assert 1 < passes["expected"] < 2


def test_without_room_for_both_one_runs_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(amount: float) -> None:
        room = (amount + scaling.ACTIVATIONS) / scaling.ROOM
        memory = type("memory", (), {"available": room})
        monkeypatch.setattr(scaling.psutil, "virtual_memory", lambda: memory)

    free(12e9)
    assert scaling.groups(10**9, 0.05) == [["full", "masked"]]  # 8 + 3.3 GB
    free(11e9)
    assert scaling.groups(10**9, 0.05) == [["full"], ["masked"]]
    free(7e9)
    assert scaling.groups(10**9, 0.05) == [["masked"]]


def test_a_pair_has_the_counts_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "BLOCK", 1000)  # several to a matrix
    monkeypatch.setattr(extract, "SHARD", 100_000)
    counts = extract.write_pair(tmp_path, TINY.models["small"], 0.3)
    assert len(extract.weight_files(tmp_path / "base")) > 1
    mask = extract_mask(tmp_path / "base", tmp_path / "tuned", progress=False)
    assert sum(mask.counts.values()) == counts[0]
    assert json.loads(json.dumps(counts)) == counts  # how they leave their process
    assert counts[2] == scaling.parameters(TINY.models["small"])
    assert mask.density == pytest.approx(0.3, abs=0.03) and 0 < counts[1] <= counts[0]


def test_time_is_fitted_where_three_pairs_were_measured() -> None:
    def pair(size: float) -> dict:
        cold = {name: {"seconds": 0.5 + size / 1e9} for name in ("ours", "read")}
        return {"bytes_a_side": size, "warm": None, "cold": cold | {"script": None}}

    fits = extract.lines([pair(s) for s in (1e9, 10e9, 100e9, 1000e9)])
    assert [(f["what"], f["kind"]) for f in fits] == [
        (f"{who}, cold, seconds", kind)
        for who in ("ours", "read")
        for kind in ("linear", "log-log")
    ]
    assert (fits[0]["slope"], fits[0]["intercept"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert fits[1]["slope"] == pytest.approx(1, abs=0.02)
    assert extract.lines([pair(1e9), pair(2e9)]) == []


def test_what_does_not_fit_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "BLOCK", 1 << 14)
    extract.write_pair(tmp_path, TINY.models["small"])
    size = extract.weight_bytes(tmp_path / "base")
    memory = type("memory", (), {"available": size})
    monkeypatch.setattr(extract.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(extract, "REPEATS", 1)
    row = extract.compare("tiny", tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert set(row["left_out"]) == {"warm", "script"} and row["warm"] is None
    assert row["cold"]["script"] is None and row["cold"]["ours_over_read"] > 0
    wrong = [1, 1, 1]
    with pytest.raises(RuntimeError, match="counts differ"):
        extract.compare("tiny", tmp_path / "base", tmp_path / "tuned", tmp_path, wrong)
