"""gather and scatter_: exact, ragged, across chunk borders, and nothing else touched."""

import pytest
import torch

from subnet_ft import SubnetError, ops
from subnet_kernels import reference
from tests.helpers import as_integers, assert_same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "one": (17, torch.tensor([5])),
    "last": (17, torch.tensor([16])),
    "none": (17, torch.empty(0, dtype=torch.int64)),
    "all": (17, torch.arange(17)),
    "ragged": (23 * 41, torch.arange(0, 23 * 41, 3)),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_reads_the_entries(dtype: torch.dtype, out: torch.dtype, case: str) -> None:
    numel, indices = CASES[case]
    dense = torch.randn(numel).to(dtype)
    expected = torch.tensor([dense[i].item() for i in indices.tolist()], dtype=dtype).to(out)
    buffer = torch.full((indices.numel(),), float("nan"), dtype=out)
    assert_same_bits(ops.gather(dense, indices, buffer), expected)
    assert_same_bits(ops.gather(dense, indices, buffer, accumulate=True), expected + expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("values_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_writes_only_the_entries(
    dtype: torch.dtype, values_dtype: torch.dtype, case: str
) -> None:
    numel, indices = CASES[case]
    dense = torch.randn(numel).to(dtype)
    before = as_integers(dense).clone()
    values = torch.randn(indices.numel()).to(values_dtype)
    ops.scatter_(dense, indices, values)
    inside = torch.zeros(numel, dtype=torch.bool)
    inside[indices] = True
    assert_same_bits(dense[inside], values.to(dtype))
    assert torch.equal(as_integers(dense)[~inside], before[~inside])


def test_scatter_rounds_to_nearest_even() -> None:
    one, ulp = 1.0, 2.0**-7  # bf16 between 1 and 2
    values = torch.tensor([one + ulp / 2, one + 1.5 * ulp, one + 0.51 * ulp])
    dense = ops.scatter_(torch.zeros(3, dtype=torch.bfloat16), torch.arange(3), values)
    assert dense.tolist() == [one, one + 2 * ulp, one + ulp]


def test_scatter_into_a_view_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(RuntimeError, match="view"):
        ops.scatter_(torch.zeros(4, 4).t(), torch.tensor([1]), torch.ones(1))


def test_the_choice_of_implementation_shows_and_can_be_forced() -> None:
    assert ops.backend() == "torch"
    dense = torch.arange(4.0)
    assert ops.gather(dense, torch.tensor([2]), impl="torch").item() == 2
    with pytest.raises(SubnetError, match="expected a backend"):
        ops.gather(dense, torch.tensor([2]), impl="cuda-magic")
