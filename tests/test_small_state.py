"""Small optimizer state: what is lost, what is not, and the kernel against its twin and float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from subnet_kernels import small_state as small
from subnet_kernels import twins
from tests.helpers import as_integers, assert_same_bits
from tests.kernel_helpers import (
    DEVICE,
    FLOATS,
    HYPER,
    INDICES,
    Case,
    adamw_truth,
    assert_no_worse,
    assert_only_changed,
    dense_of,
    jitted,
)
from tests.test_kernels import FP32_TOLERANCE

EXPONENTS = torch.tensor([0, 1, 100, 127, 254], dtype=torch.int32)
SMALL = [(8, False), (32, True), (8, True)]
CASES = [
    Case((1, 1), "all"),
    Case((17, 23), "last"),
    Case((33, 31), "all"),
    Case((63, 19), "third"),
]


@pytest.mark.parametrize("exponent", EXPONENTS.tolist())
@pytest.mark.parametrize("sign", [1, -1])
def test_a_residual_recovers_every_mantissa(sign: int, exponent: int) -> None:
    """All 2**23 of fp32: to 1/256 of a bf16 step, half of that when rounded to nearest."""
    bits = torch.arange(1 << 23, dtype=torch.int32) | exponent << 23
    x = bits.view(torch.float32).mul_(sign)
    for dither in (0, 128, 255):
        values, residual = small.split(x, dither)
        off = (small.join(values, residual).view(torch.int32) - x.view(torch.int32)).abs()
        # In units of fp32's last place, of which a bf16 step has 2**16 and a code 2**8.
        assert off.max() <= (128 if dither == 128 else 255)
        clear = residual != -128  # a midpoint between two bf16 values goes outward
        rounded = small.join(values, residual).to(torch.bfloat16)
        assert torch.equal(as_integers(rounded)[clear], as_integers(values)[clear])


def test_over_256_steps_nothing_is_lost_on_average() -> None:
    low = torch.arange(256, dtype=torch.int32)
    x = (low | 0x3F80_1200).view(torch.float32)
    found = [small.join(*small.split(x, dither)) for dither in map(small.dither, range(1, 257))]
    bits = torch.stack(found).view(torch.int32).double().mean(0)
    assert torch.equal(bits, x.view(torch.int32).double())


def test_updates_far_below_a_code_add_up() -> None:
    """Near 0.1 a code is 1.9e-6: 1000 steps of 2e-8 are some ten of them, as in fp32."""
    x = exact = torch.tensor([0.1, -0.1]).to(torch.bfloat16).float()
    values, residual = small.split(x, 128)
    for step in range(1, 1001):
        exact = exact + 2e-8
        values, residual = small.split(small.join(values, residual) + 2e-8, small.dither(step))
    assert ((small.join(values, residual) - exact).abs() <= 1.0 / 2**19).all()  # one code
    still, residual = small.split(x, 128)
    for step in range(1, 257):
        still, residual = small.split(small.join(still, residual), small.dither(step))
    assert_same_bits(small.join(still, residual), x, "what does not change stays")


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000])
def test_nan_and_infinity_stay_what_they_are(bits: int) -> None:
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for dither in (0, 255):
        torch.testing.assert_close(small.join(*small.split(x, dither)), x, equal_nan=True)


@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000])
def test_8_bit_moments(numel: int) -> None:
    x = torch.randn(numel) * torch.logspace(-6, 0, numel)
    codes, scales = small.quantize_exp_avg(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    back = small.dequantize(codes, scales)
    scale = scales.repeat_interleave(small.BLOCK)[:numel]
    # companding: the error is half a code in sqrt(|x| / scale)
    assert ((back.abs() / scale).sqrt() - (x.abs() / scale).sqrt()).abs().max() <= 0.51 / 127
    assert torch.equal(back.sign()[codes != 0], x.sign()[codes != 0])
    square = x.square()
    codes, scales = small.quantize_exp_avg_sq(square, 1)
    back = small.dequantize(codes, scales)
    assert ((back > 0) == (square > 0)).all()
    assert small.quantize_exp_avg_sq(torch.zeros(numel), 1)[0].eq(0).all()


@pytest.mark.parametrize("target", [0.0, 1e-3, 0.5])
def test_averages_of_squares_drift_as_in_fp32(target: float) -> None:
    """From 0.1 towards a target, a thousandth a step: less than half a code, for 3000 steps."""
    exact, v = (torch.full((256,), 0.1) for _ in "ab")
    exact[0] = v[0] = 1.0  # the block's largest, and it stays
    for step in range(1, 3001):
        exact[1:] = 0.999 * exact[1:] + 0.001 * target
        v[0], v[1:] = 1.0, 0.999 * v[1:] + 0.001 * target
        v = small.dequantize(*small.quantize_exp_avg_sq(v, step))
    ratio = v[1:] / exact[1:]
    assert abs(ratio.mean() - 1) < 0.02
    assert (ratio - 1).abs().max() < 0.1


def decoded(state: dict[str, list[Tensor]]) -> list[list[Tensor]]:
    """Return values, exp_avgs and exp_avg_sqs in fp32."""
    values, moments = state["values"], [state["exp_avgs"], state["exp_avg_sqs"]]
    if "residuals" in state:
        values = list(map(small.join, values, state["residuals"]))
    if "exp_avg_scales" in state:
        scales = (state["exp_avg_scales"], state["exp_avg_sq_scales"])
        moments = [list(map(small.dequantize, *pair)) for pair in zip(moments, scales, strict=True)]
    return [values, *moments]


def fresh_state(values: list[Tensor], bits: int, residual: bool) -> dict[str, list[Tensor]]:
    """Small state that is not zero: what moments of random numbers become."""
    state: dict[str, list[Tensor]] = {"values": values}
    moments = {"exp_avg": [torch.randn_like(p) for p in values]}
    moments["exp_avg_sq"] = [m.square() * 0.1 for m in moments["exp_avg"]]
    for name, of in moments.items():
        if bits == 8:
            quantize = small.quantize_exp_avg
            if name == "exp_avg_sq":
                quantize = partial(small.quantize_exp_avg_sq, step=1)
            pairs = [quantize(moment) for moment in of]
            state[f"{name}s"], state[f"{name}_scales"] = map(list, zip(*pairs, strict=True))
        else:
            state[f"{name}s"] = of
    if residual:
        pairs = [small.split(p, 128) for p in values]
        state["values"], state["residuals"] = map(list, zip(*pairs, strict=True))
    return state


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("bits", "residual"), SMALL)
def test_the_kernel_is_no_worse_than_its_twin(
    bits: int, residual: bool, dtype: torch.dtype, index: torch.dtype, grad_dtype: torch.dtype
) -> None:
    indices = [case.indices() for case in CASES]
    denses = [dense_of(case, dtype) for case in CASES]
    kernel = fresh_state(
        [twins.gather(d, i) for d, i in zip(denses, indices, strict=True)], bits, residual
    )
    before = [dense.clone() for dense in denses]
    for step in (1, 2):
        twin = {name: [t.clone() for t in column] for name, column in kernel.items()}
        copies = [dense.clone() for dense in denses]
        grads = [torch.randn(i.numel(), device=DEVICE).to(grad_dtype) for i in indices]
        values, *moments = [[t.double() for t in column] for column in decoded(kernel)]
        adamw_truth([values, [g.double() for g in grads], *moments], step, 0.37)
        for state, weights, kept, operation in (
            (twin, copies, indices, twins.adamw_small_step_),
            (kernel, denses, [i.to(index) for i in indices], jitted.adamw_small_step_),
        ):
            names = ("exp_avgs", "exp_avg_sqs")
            rest = {k: v for k, v in state.items() if k not in ("values", *names)}
            columns = [state["values"], grads, *(state[name] for name in names), weights, kept]
            operation(*columns, **rest, step=step, grad_scale=0.37, **HYPER)
        for true, expected, found in zip(
            [values, *moments], decoded(twin), decoded(kernel), strict=True
        ):
            assert_no_worse(true, expected, found, FP32_TOLERANCE)
    for old, dense, kept, p in zip(before, denses, indices, kernel["values"], strict=True):
        assert_same_bits(dense.flatten()[kept], p.to(dtype), "the weight is the values")
        assert_only_changed(old, dense, kept)


def test_operands_of_another_kind_are_refused() -> None:
    values, grads = [torch.zeros(3, device=DEVICE)], [torch.zeros(3, device=DEVICE)]
    codes = [torch.zeros(3, dtype=d, device=DEVICE) for d in (torch.int8, torch.uint8)]
    rest = [[torch.zeros(3, device=DEVICE)], [torch.arange(3, device=DEVICE)]]
    moments = [[torch.zeros(3, device=DEVICE)] for _ in "mv"]
    residuals = [torch.zeros(3, dtype=torch.int8, device=DEVICE)]
    scales = {
        f"{name}_scales": [torch.zeros(2, device=DEVICE)] for name in ("exp_avg", "exp_avg_sq")
    }
    for columns, options, message in (
        ([[codes[0]], [codes[1]]], {}, "exp_avgs of tensor 0: expected dtype float32, got"),
        (moments, {"residuals": residuals}, "values of tensor 0: expected dtype bfloat16"),
        ([[codes[0]], [codes[1]]], scales, "exp_avg_scales of tensor 0: expected 1 entries, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            jitted.adamw_small_step_(values, grads, *columns, *rest, **options, step=1, **HYPER)
