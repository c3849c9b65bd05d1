"""Triton kernels against their torch twins and float64, interpreted where there is no GPU."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from subnet_ft.storage.codec import encode_indices
from subnet_kernels import _tune, encoding, twins
from subnet_kernels._launch import LaunchTable
from subnet_kernels.encoding import Bitmap, choose_encoding, decode_bitmap, encode_bitmap
from tests.helpers import assert_same_bits
from tests.kernel_helpers import (
    DEVICE,
    FLOATS,
    HYPER,
    INDICES,
    KERNELS,
    Case,
    adamw_truth,
    assert_no_worse,
    assert_only_changed,
    dense_of,
    jitted,
    poisoned,
    tensors_of_many_sizes,
)

KERNEL_ROOT = Path(__file__).parents[1] / "kernels" / "torch-ext"
CASES = [
    Case((1, 1), "all"),
    Case((17, 23), "one"),
    Case((17, 23), "last"),
    Case((17, 23), "all"),
    Case((63, 129), "third"),
]
# A handful of fp32 roundings may fall otherwise: fused multiply-add on a GPU or in torch's vector
# code, none in the interpreter. Four steps of some eight operations, half an ulp (2**-24) each.
FP32_TOLERANCE = 4 * 8 * 2.0**-24

by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
by_index = pytest.mark.parametrize("index", INDICES, ids=str)


@by_id
@by_index
@by_dtype
def test_gather_equals_its_twin(dtype: torch.dtype, index: torch.dtype, case: Case) -> None:
    dense, indices = dense_of(case, dtype), case.indices(index)
    out = poisoned(indices.numel())
    assert jitted.gather(dense, indices, out) is out
    assert_same_bits(out, dense.flatten()[indices.long()].float())
    jitted.gather(dense, indices, out, accumulate=True)
    assert_same_bits(out, 2 * dense.flatten()[indices.long()].float())


@pytest.mark.parametrize("compact", FLOATS, ids=str)
@by_dtype
def test_every_pair_of_dtypes(dtype: torch.dtype, compact: torch.dtype) -> None:
    case = Case((17, 23), "third")
    dense, indices = dense_of(case, dtype), case.indices()
    out, expected = (poisoned(indices.numel(), compact) for _ in range(2))
    for accumulate in (False, True):
        jitted.gather(dense, indices, out, accumulate)
        twins.gather(dense, indices, expected, accumulate)
        assert_same_bits(out, expected)
    values, other = torch.randn_like(out), dense.clone()
    assert_same_bits(
        jitted.scatter_(dense, indices, values), twins.scatter_(other, indices, values)
    )


def test_gather_allocates_fp32() -> None:
    out = jitted.gather(
        torch.ones(3, dtype=torch.bfloat16, device=DEVICE), torch.tensor([2]).to(DEVICE)
    )
    assert out.dtype == torch.float32 and out.tolist() == [1.0]


@by_id
@by_index
@by_dtype
def test_scatter_equals_its_twin(dtype: torch.dtype, index: torch.dtype, case: Case) -> None:
    dense, indices = dense_of(case, dtype), case.indices(index)
    before, expected = dense.clone(), dense.clone()
    values = torch.randn(indices.numel(), device=DEVICE)
    assert jitted.scatter_(dense, indices, values) is dense
    assert_same_bits(dense, twins.scatter_(expected, indices.long(), values))
    assert_only_changed(before, dense, indices)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, where fp16 becomes infinite
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torch_s_for_every_kind_of_float(dtype: torch.dtype) -> None:
    # All 65536 upper halves (signs, exponents, mantissas, infinities), each with a tie, its two
    # neighbours or a random lower half.
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    lower = torch.randint(0, 1 << 16, (1 << 16,), dtype=torch.int32)
    lower[::2] = torch.tensor([0x7FFF, 0x8000, 0x8001, 0]).repeat(1 << 13).int()
    values = (upper | lower).view(torch.float32).to(DEVICE)
    indices = torch.arange(1 << 16, device=DEVICE)
    dense = jitted.scatter_(poisoned(1 << 16, dtype), indices, values)
    expected = values.to(dtype)
    assert torch.equal(dense.isnan(), expected.isnan())
    assert_same_bits(dense[~dense.isnan()], expected[~expected.isnan()])


def test_one_launch_serves_many_tensors() -> None:
    denses, indices = tensors_of_many_sizes()
    outs, expected = ([poisoned(index.numel()) for index in indices] for _ in range(2))
    table = LaunchTable()
    for accumulate in (False, True):
        jitted.gather_many(denses, indices, outs, accumulate, table)
        twins.gather_many(denses, indices, expected, accumulate)
        for found, right in zip(outs, expected, strict=True):
            assert_same_bits(found, right)
    assert len(table.groups) == 2  # fp32 with int32, bf16 with int64
    values = [torch.randn(index.numel(), device=DEVICE) for index in indices]
    copies = [dense.clone() for dense in denses]
    jitted.scatter_many_(denses, indices, values)
    twins.scatter_many_(copies, [index.long() for index in indices], values)
    for found, right in zip(denses, copies, strict=True):
        assert_same_bits(found, right)


def test_a_table_is_uploaded_again_only_when_a_tensor_moved() -> None:
    table, indices, out = LaunchTable(), Case((9,), "third").indices(), poisoned(3)
    dense, moved = torch.randn(2, 3, 3).to(DEVICE)
    jitted.gather_many([dense], [indices], [out], table=table)
    groups = table.groups
    dense.neg_()
    jitted.gather_many([dense], [indices], [out], table=table)
    assert table.groups is groups
    assert torch.equal(out, dense.flatten()[indices])
    # Same address, but no longer what it was.
    with pytest.raises(ValueError, match="3 entries"):
        jitted.gather_many([dense], [indices], [out[:2]], table=table)
    with pytest.raises(ValueError, match="contiguous"):
        jitted.gather_many([dense.t()], [indices], [out], table=table)
    jitted.gather_many([moved], [indices], [out], table=table)
    assert table.groups is not groups
    assert torch.equal(out, moved.flatten()[indices])


def test_nothing_to_do_is_no_launch() -> None:
    assert jitted.gather_many([], [], []) == []
    empty = torch.empty(0, device=DEVICE)
    assert jitted.gather(empty, empty.int()).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": torch.ones(4, 3).t()}, "dense of tensor 0: expected it contiguous"),
        ({"dense": torch.ones(12).double()}, "dense of tensor 0: expected dtype float32"),
        ({"indices": torch.ones(3)}, "indices of tensor 0: expected dtype int32, int64"),
        ({"indices": torch.arange(6)[::2]}, "indices of tensor 0: expected it contiguous"),
        ({"values": torch.ones(2)}, "values of tensor 0: expected 3 entries, got 2"),
        ({"values": torch.ones(3, dtype=torch.int32)}, "values of tensor 0: expected dtype"),
        ({"values": torch.ones(3, device="meta")}, "tensor 0: expected one device"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Tensor], message: str) -> None:
    good = {"dense": torch.ones(12), "indices": torch.arange(3), "values": torch.ones(3)}
    on_device = {k: v if v.is_meta else v.to(DEVICE) for k, v in (good | change).items()}
    before = on_device["dense"].clone()
    with pytest.raises(ValueError, match=message) as error:
        jitted.scatter_(*on_device.values())
    assert "\n" not in str(error.value)
    assert torch.equal(on_device["dense"], before)


def test_lists_of_different_lengths_are_refused() -> None:
    one = torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="as many tensors"):
        jitted.gather_many([one, one], [one.int()], [one])
    with pytest.raises(ValueError, match="out tensor"):
        jitted.gather(one, one.int(), accumulate=True)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_more_elements_than_int32_counts(index: torch.dtype) -> None:
    """Pages that nothing touches take no memory: these 4 GiB are a few KiB."""
    if index == torch.int32:
        positions = torch.tensor([0, 2**31 - 1])
    else:
        positions = torch.tensor([1, 2**31 - 1, 2**31, 2**31 + 16])
    dense = torch.empty(2**31 + 17, dtype=torch.bfloat16, device=DEVICE)
    indices = positions.to(DEVICE, index)
    values = torch.arange(1.0, 1 + len(positions), device=DEVICE)
    jitted.scatter_(dense, indices, values)
    assert torch.equal(dense[positions.to(DEVICE)].float(), values)
    assert torch.equal(jitted.gather(dense, indices), values)


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("index", [*INDICES, torch.uint8], ids=["int32", "int64", "bitmap"])
@by_dtype
def test_adamw_is_no_worse_than_its_twin(
    dtype: torch.dtype, index: torch.dtype, scale: float
) -> None:
    flat = index != torch.uint8
    cases = [*CASES[:4], Case((63, 19), "third")]
    indices = [case.indices() for case in cases] + [torch.arange(0).to(DEVICE)]
    denses = [dense_of(case, dtype) for case in cases] + [torch.ones(5).to(DEVICE, dtype)]
    values = [twins.gather(d, i) for d, i in zip(denses, indices, strict=True)]
    states = [values, *([torch.zeros_like(p) for p in values] for _ in range(3))]
    twin = [[t.clone() for t in column] for column in states]
    truth = [[t.double() for t in column] for column in states]
    before, copies = ([d.clone() for d in denses] for _ in range(2))
    if flat:
        kept, kernel = [i.to(index) for i in indices], jitted.adamw_step_
    else:
        kept = [encode_bitmap(i, d.numel()) for i, d in zip(indices, denses, strict=True)]
        kernel = jitted.adamw_bitmap_step_
    table, steps = LaunchTable(), 4 if flat else 2
    for step in range(1, 1 + steps):
        for i, p in enumerate(values):
            grad = torch.randn_like(p)
            for column in (states, twin, truth):
                column[1][i].copy_(grad)
        adamw_truth(truth, step, scale)
        twins.adamw_step_(*twin, copies, indices, step=step, grad_scale=scale, **HYPER)
        on_device = torch.tensor(scale, device=DEVICE)
        kernel(*states, denses, kept, step=step, grad_scale=on_device, table=table, **HYPER)
    for column in (0, 2, 3):
        assert_no_worse(truth[column], twin[column], states[column], FP32_TOLERANCE)
    for old, dense, index_, p in zip(before, denses, indices, values, strict=True):
        assert_same_bits(dense.flatten()[index_], p.to(dtype), "the weight is the values")
        assert_only_changed(old, dense, index_)


def test_adamw_twin_over_bitmaps_is_the_one_over_indices() -> None:
    grads, dense, indices = torch.randn(7), torch.randn(4, 5), torch.arange(0, 20, 3)
    ours, theirs = ([[torch.ones(7)], [grads], *[[torch.zeros(7)] for _ in "mv"]] for _ in "ab")
    copy = dense.clone()
    twins.adamw_step_(*ours, [dense], [indices], step=1, **HYPER)
    twins.adamw_bitmap_step_(*theirs, [copy], [encode_bitmap(indices, 20)], step=1, **HYPER)
    for (found,), (right,) in zip([*ours, [dense]], [*theirs, [copy]], strict=True):
        assert_same_bits(found, right)


def test_adamw_agrees_with_torch_s_own() -> None:
    p, grads = torch.randn(300, device=DEVICE), torch.randn(3, 300, device=DEVICE)
    own = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([own], 1e-2, (0.9, 0.95), 1e-3, weight_decay=0.1, fused=True)
    dense, indices = torch.empty(300, device=DEVICE), torch.arange(300, device=DEVICE)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step, grad in enumerate(grads, start=1):
        own.grad = grad.clone()
        optimizer.step()
        jitted.adamw_step_([p], [grad], [m], [v], [dense], [indices], step=step, **HYPER)
    torch.testing.assert_close(p, own.detach(), rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)
    assert_same_bits(dense, p)


def test_adamw_refuses_a_step_that_was_not_counted() -> None:
    with pytest.raises(ValueError, match="expected 1 or more, got 0"):
        jitted.adamw_step_([], [], [], [], [], [], step=0, **HYPER)


BITMAP_CASES = [*CASES[:4], Case((37, 61), "third")]  # the last has three blocks
by_bitmap = pytest.mark.parametrize("case", BITMAP_CASES, ids=lambda case: case.id)


@by_bitmap
@by_index
def test_a_bitmap_is_the_mask_file_s(index: torch.dtype, case: Case) -> None:
    indices = case.indices(index).cpu()
    bitmap = encode_bitmap(indices, case.numel)
    assert_same_bits(decode_bitmap(bitmap), indices.long())
    kind, stored = encode_indices(indices, case.numel)
    if kind == "bitmap":
        assert torch.equal(bitmap.bits, stored)
    starts = range(0, case.numel, encoding.BITMAP_BLOCK)
    assert bitmap.offsets.tolist() == [int((indices < start).sum()) for start in starts]


def test_the_cheaper_encoding_is_chosen() -> None:
    # Bytes an element: 1/8 + 8/1024 against 4 (or 8) * density: even at 3.32% (1.66%).
    for numel, even in ((1 << 30, 0.0332), (1 << 32, 0.0166)):
        assert choose_encoding(int(numel * (even - 0.0001)), numel) == "indices"
        assert choose_encoding(int(numel * (even + 0.0001)), numel) == "bitmap"
    assert choose_encoding(0, 100) == choose_encoding(1, 1) == "indices"
    assert choose_encoding(100, 100) == "bitmap"


@by_bitmap
@by_dtype
def test_bitmap_kernels_equal_their_twins(dtype: torch.dtype, case: Case) -> None:
    dense, indices = dense_of(case, dtype), case.indices()
    bitmap = Bitmap(*(t.to(DEVICE) for t in encode_bitmap(indices.cpu(), case.numel)))
    out = poisoned(indices.numel())
    jitted.gather_bitmap(dense, bitmap, out)
    assert_same_bits(out, dense.flatten()[indices].float())
    before, expected = dense.clone(), dense.clone()
    values = torch.randn_like(out)
    jitted.scatter_bitmap_(dense, bitmap, values)
    assert_same_bits(dense, twins.scatter_bitmap_(expected, bitmap, values))
    assert_only_changed(before, dense, indices)


def test_bitmaps_of_many_tensors_in_one_launch() -> None:
    denses, indices = tensors_of_many_sizes()
    bitmaps = [encode_bitmap(i, d.numel()) for d, i in zip(denses, indices, strict=True)]
    outs, expected = ([poisoned(index.numel()) for index in indices] for _ in range(2))
    for accumulate in (False, True):
        jitted.gather_bitmap_many(denses, bitmaps, outs, accumulate)
        twins.gather_bitmap_many(denses, bitmaps, expected, accumulate)
    copies = [dense.clone() for dense in denses]
    jitted.scatter_bitmap_many_(denses, bitmaps, [-out for out in outs])
    twins.scatter_bitmap_many_(copies, bitmaps, [-out for out in expected])
    for found, right in zip([*outs, *denses], [*expected, *copies], strict=True):
        assert_same_bits(found, right)


def test_a_bitmap_of_another_tensor_is_refused() -> None:
    bitmap = encode_bitmap(torch.arange(3, device=DEVICE), 64)
    with pytest.raises(ValueError, match="bits of tensor 0: expected 16 entries, got 8"):
        jitted.gather_bitmap(torch.ones(65, device=DEVICE), bitmap, torch.ones(3, device=DEVICE))


def test_the_fastest_block_size_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[_tune.Config] = []

    def run(columns: list[Tensor], length: int, config: _tune.Config) -> _tune.Config:
        dense, indices = columns
        assert indices.numel() == length and int(indices[-1]) < dense.numel()
        timed.append(config)
        return config

    monkeypatch.setattr(_tune, "is_interpreted", lambda kernel: False)
    monkeypatch.setattr(_tune, "milliseconds", lambda config: abs(config.block - 1000))
    dtypes = (torch.bfloat16, torch.int32)
    for _ in range(2):
        best = _tune.best_config("a kernel", torch.device("cpu"), dtypes, run)
        assert best == _tune.Config(1024, 4)
    assert timed == [*_tune.SEARCH]


def test_every_launcher_has_a_twin_of_the_same_signature() -> None:
    assert jitted.__all__ == twins.__all__
    for name in jitted.__all__:
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (jitted, twins))
        assert [*ours.parameters] == [*theirs.parameters], name
        defaults = [[p.default for p in s.parameters.values()] for s in (ours, theirs)]
        assert defaults[0] == defaults[1], name


def test_every_kernel_says_what_it_moves() -> None:
    for kernel in KERNELS:
        text = kernel.__doc__ or kernel.fn.__doc__
        for word in ("Compute", "Grid:", "Bytes", "Twin:"):
            assert word in text, f"{kernel}: {word}"


def test_the_package_needs_no_triton() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(KERNEL_ROOT)!r}); sys.modules['triton'] = None; "
        "import subnet_kernels as k; k.twins.gather; k.encoding.choose_encoding(1, 2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = __import__("subnet_kernels").no_such_name
