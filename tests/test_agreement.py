"""Agreement figures and their nulls on tensors small enough to work out by hand."""

import doctest
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from subnet_ft.analysis import agreement, nulls
from subnet_ft.analysis.agreement import count_agreement, from_ordinals, measure_agreement, ordinals
from subnet_ft.analysis.nulls import coin_flips, measure_nulls, move_one_ulp
from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.errors import CheckpointError

ULP = 2.0**-7  # distance from 1.0 to the next larger bf16 value


@pytest.fixture
def stored(tmp_path: Path):
    """Writes tensors to a file and opens it as a checkpoint."""

    def store(tensors: dict[str, Tensor]) -> Checkpoint:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file(tensors, path)
        return open_checkpoint(path)

    return store


def test_ordinals_number_every_finite_bf16_value_in_ascending_order() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    values = values[values.isfinite()]
    ascending = values.float().sort().values.unique()  # unique: the two zeros are one value
    numbers = ordinals(ascending)
    assert (numbers[1:] - numbers[:-1] == 1).all()
    assert torch.equal(from_ordinals(numbers).float(), ascending)


def test_ulps_are_counted_across_binades_and_zero() -> None:
    tiny = torch.finfo(torch.bfloat16).smallest_normal / 128  # the smallest subnormal
    a = torch.tensor([1.0, 2.0, -tiny, -0.0])
    b = torch.tensor([1 - ULP / 2, 2 + 2 * ULP, tiny, 0.0])
    assert (ordinals(b) - ordinals(a)).tolist() == [-1, 1, 2, 0]


def test_figures_of_a_worked_example(stored) -> None:
    base = {"a": torch.ones(2, 4), "b": torch.zeros(2)}
    full = {"a": torch.ones(2, 4), "b": torch.zeros(2)}
    run = {"a": torch.ones(2, 4), "b": torch.zeros(2)}
    full["a"].view(-1)[:6] += torch.tensor([1, 1, -1, 2, 6, 1]) * ULP
    run["a"].view(-1)[:6] += torch.tensor([1, 2, 1, 0, 1, 4]) * ULP
    mask = {"a": torch.arange(6, dtype=torch.int32)}

    figures = measure_agreement(stored(base), stored(full), stored(run), mask)
    assert figures["agreement_bitwise"] == 5 / 10
    assert figures["in_mask_agreement_bitwise"] == 1 / 6
    # Moved the wrong way (the third) and not moved (the fourth) disagree.
    assert figures["in_mask_sign_agreement"] == 4 / 6
    # Below 1.0 bf16 is twice as fine, so 1 - ULP to 1 + ULP is 3 ulps: the third weight.
    assert figures["ulp_error_histogram"] == pytest.approx(
        {"0": 1 / 6, "1": 1 / 6, "2": 1 / 6, "3-4": 2 / 6, ">4": 1 / 6}
    )


def test_tolerance_is_the_papers_in_bf16() -> None:
    full = torch.zeros(3)
    run = torch.tensor([0.9e-5, 1e-5, 1.1e-5])
    counts = count_agreement(full, full, run, torch.arange(3))
    assert counts["agreement_1e-5"] == 2
    assert counts["agreement_bitwise"] == 0
    closest = torch.isclose(run.bfloat16(), full.bfloat16(), atol=1e-5)
    assert int(closest.sum()) == counts["agreement_1e-5"]


def test_runs_are_compared_in_bf16_and_zeros_are_equal() -> None:
    base = torch.tensor([1.0, 0.0])
    run = torch.tensor([1.0 + ULP / 4, -0.0])  # rounds back to 1.0
    counts = count_agreement(base, base, run, torch.arange(2))
    assert counts["agreement_bitwise"] == 2
    assert counts["in_mask_sign_agreement"] == 2  # two zero moves agree
    assert counts["ulps 0"] == 2


def test_empty_mask_has_no_in_mask_figures(stored) -> None:
    weights = stored({"w": torch.ones(3)})
    figures = measure_agreement(weights, weights, weights, {})
    assert figures["agreement_bitwise"] == 1.0
    assert figures["in_mask_agreement_bitwise"] is None
    assert set(figures["ulp_error_histogram"].values()) == {None}


def test_a_run_agrees_with_itself_and_the_base_with_nothing(stored) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(40, 25, generator=generator)}
    full = {"w": base["w"] * 1.05}
    changed = (base["w"].bfloat16() != full["w"].bfloat16()).flatten().nonzero()[:, 0]
    before, after = stored(base), stored(full)
    itself = measure_agreement(before, after, after, {"w": changed})
    untouched = measure_agreement(before, after, before, {"w": changed})
    assert {v for v in itself.values() if isinstance(v, float)} == {1.0}
    assert untouched["in_mask_agreement_bitwise"] == 0.0
    assert untouched["in_mask_sign_agreement"] == 0.0
    assert untouched["agreement_bitwise"] == pytest.approx(1 - changed.numel() / 1000)


def test_one_ulp_moves_only_the_mask_and_exactly_one_value() -> None:
    base = torch.tensor([[1.0, -1.0], [0.0, 3.0]])
    moved = move_one_ulp(base, torch.tensor([0, 1, 2]), torch.tensor([-1, 1, 1]))
    assert moved.dtype == torch.bfloat16 and moved.shape == base.shape
    assert (ordinals(moved) - ordinals(base)).tolist() == [[-1, 1], [1, 0]]
    assert base.tolist() == [[1.0, -1.0], [0.0, 3.0]]  # the base itself is not written to


def test_nulls_know_the_mask_or_the_mask_and_the_sign(stored) -> None:
    generator = torch.Generator().manual_seed(1)
    count = 20_000
    base = {"w": torch.randn(count, generator=generator).bfloat16()}
    step = coin_flips(count, generator)
    step[: count // 4] *= 3  # three quarters of the moves are a single ulp
    full = {"w": from_ordinals(ordinals(base["w"]) + step)}
    mask = {"w": torch.arange(count)}

    before, after = stored(base), stored(full)
    figures = measure_nulls(before, after, mask, seed=2)
    directed, flipped = figures["one_ulp_right_direction"], figures["one_ulp_coin_flip"]
    assert directed["in_mask_agreement_bitwise"] == 0.75
    assert directed["in_mask_sign_agreement"] == 1.0
    assert directed["ulp_error_histogram"]["2"] == 0.25
    assert flipped["in_mask_agreement_bitwise"] == pytest.approx(0.375, abs=0.02)
    assert flipped["in_mask_sign_agreement"] == pytest.approx(0.5, abs=0.02)
    assert figures == measure_nulls(before, after, mask, seed=2)


def test_runs_of_different_models_are_refused(stored) -> None:
    base, full = stored({"w": torch.ones(3)}), stored({"w": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"w: expected the same shape.*\(3,\).*\(4,\)"):
        measure_agreement(base, full, base, {})
    with pytest.raises(CheckpointError, match="one base model"):
        measure_nulls(base, full, {})


@pytest.mark.parametrize("module", [agreement, nulls])
def test_examples_in_the_docstrings(module) -> None:
    assert doctest.testmod(module).failed == 0
