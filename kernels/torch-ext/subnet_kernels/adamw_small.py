"""adamw_small_step_: the step of `adamw` with 8-bit moments, a residual beside bf16, or both."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tune, small_state
from ._jit import converted, find_work, larger, pointer
from ._launch import FLOATS, INDICES, Column, LaunchTable, launch
from .adamw import adamw_update, scalars, scale_tensor

SPAN = tl.constexpr(small_state.BLOCK)
# Of those in `_tune`, the ones of 4 entries a thread: with 8, sm_90 puts some on the stack.
SEARCH = tuple(config for config in _tune.SEARCH if config.block <= 128 * config.num_warps)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def nearest(x: tl.tensor) -> tl.tensor:
    """Round to an integer, ties to even; for 0 <= x < 2**22."""
    return (x + 8388608.0) - 8388608.0


@triton.jit
def dequantized(codes: tl.tensor, scale: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """Return fp32: see `small_state.dequantize`."""
    code = codes.to(tl.float32)
    if SIGNED:
        unit = code * (1 / 127)
        unit = unit * tl.abs(unit)
    else:
        unit = code * (1 / 255)
        unit = unit * unit
        unit = unit * unit
    return unit * scale


@triton.jit
def largest(x: tl.tensor) -> tl.tensor:
    """Return the largest magnitude of each row, (groups, 1)."""
    return tl.reduce(tl.abs(x), 1, larger, keep_dims=True)


@triton.jit
def exp_avg_codes(m: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return codes, fp32: see `small_state.quantize_exp_avg`."""
    codes = nearest(tl.sqrt_rn(tl.div_rn(tl.abs(m), larger(scale, TINY))) * 127)
    return tl.where(m < 0, -codes, codes)


@triton.jit
def exp_avg_sq_codes(v: tl.tensor, scale: tl.tensor, dither: tl.tensor) -> tl.tensor:
    """Return codes, fp32: see `small_state.quantize_exp_avg_sq`."""
    root = tl.sqrt_rn(tl.sqrt_rn(tl.div_rn(v, larger(scale, TINY))))
    ahead = ((dither + 159 * tl.arange(0, SPAN)) % 256 + 0.5) * (1 / 256)
    return larger(tl.floor(root * 255 + ahead[None, :]), tl.where(v > 0, 1.0, 0.0))


@triton.jit
def joined(values: tl.tensor, residual: tl.tensor) -> tl.tensor:
    """Return fp32: see `small_state.join`."""
    bits = (values.to(tl.int16, bitcast=True).to(tl.int32) << 8) + residual.to(tl.int32)
    return (bits << 8).to(tl.float32, bitcast=True)


@triton.jit
def parted(x: tl.tensor, dither: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return bf16 values and int8 residuals: see `small_state.split`."""
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    bits = (bits + dither) >> 8
    values = (bits + 0x80) >> 8
    residual = bits - (values << 8)
    return values.to(tl.int16).to(tl.bfloat16, bitcast=True), residual.to(tl.int8)


@triton.jit
def _adamw_small_kernel(
    table_ptr: tl.tensor,
    tensor_of_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    decay: tl.tensor,
    lerp1: tl.tensor,
    beta2: tl.tensor,
    weight2: tl.tensor,
    bias2_sqrt: tl.tensor,
    eps: tl.tensor,
    step_size: tl.tensor,
    dither: tl.tensor,
    DENSE: tl.constexpr,
    INDEX: tl.constexpr,
    VALUES: tl.constexpr,
    GRADS: tl.constexpr,
    EXP_AVGS: tl.constexpr,
    EXP_AVG_SQS: tl.constexpr,
    EXP_AVG_SCALES: tl.constexpr,
    EXP_AVG_SQ_SCALES: tl.constexpr,
    RESIDUALS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute `adamw_update` of every entry: its state widened before, made small again after.

    Grid: one program for BLOCK entries of one tensor, BLOCK / 256 blocks of 8-bit moments. Table
    columns: dense, indices, values, grads, exp_avgs, exp_avg_sqs, the moments' scales, residuals;
    scales and residuals are read where EXP_AVGS is int8 and VALUES bf16. Bytes an entry: 4 or 8
    (index), 2 or 4 (g) read; 2 (p and residual: 3, p fp32: 4, each read and written), 2.03 (8-bit
    m, v, scales) or 8 (fp32 m, v), each read and written; a 32-byte sector of dense read and
    written, shared by its neighbours. Twin: ``reference_adamw.adamw_small_step_``.
    """
    row_ptr, _, start, length = find_work(table_ptr, tensor_of_ptr, 9, BLOCK)
    dense_ptr = pointer(row_ptr, 0, DENSE)
    indices_ptr = pointer(row_ptr, 1, INDEX)
    p_ptr = pointer(row_ptr, 2, VALUES)
    g_ptr = pointer(row_ptr, 3, GRADS)
    m_ptr = pointer(row_ptr, 4, EXP_AVGS)
    v_ptr = pointer(row_ptr, 5, EXP_AVG_SQS)

    span = start // SPAN + tl.arange(0, BLOCK // SPAN)[:, None]
    offs = span * SPAN + tl.arange(0, SPAN)[None, :]
    inside = offs < length
    inside_span = span * SPAN < length
    index = tl.load(indices_ptr + offs, mask=inside, other=0).to(tl.int64)
    g = tl.load(g_ptr + offs, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    p = tl.load(p_ptr + offs, mask=inside, other=0.0)
    m = tl.load(m_ptr + offs, mask=inside, other=0)
    v = tl.load(v_ptr + offs, mask=inside, other=0)
    if VALUES == tl.bfloat16:
        residual_ptr = pointer(row_ptr, 8, RESIDUALS)
        p = joined(p, tl.load(residual_ptr + offs, mask=inside, other=0))
    if EXP_AVGS == tl.int8:
        m_scale_ptr = pointer(row_ptr, 6, EXP_AVG_SCALES)
        v_scale_ptr = pointer(row_ptr, 7, EXP_AVG_SQ_SCALES)
        m = dequantized(m, tl.load(m_scale_ptr + span, mask=inside_span, other=0.0), True)
        v = dequantized(v, tl.load(v_scale_ptr + span, mask=inside_span, other=0.0), False)
    dither = tl.cast(dither, tl.int32)
    p, m, v = adamw_update(p, g, m, v, decay, lerp1, beta2, weight2, bias2_sqrt, eps, step_size)
    if EXP_AVGS == tl.int8:
        m_scale, v_scale = largest(m), largest(v)
        m = exp_avg_codes(m, m_scale)
        v = exp_avg_sq_codes(v, v_scale, dither)
        tl.store(m_scale_ptr + span, m_scale, mask=inside_span)
        tl.store(v_scale_ptr + span, v_scale, mask=inside_span)
    tl.store(m_ptr + offs, m.to(EXP_AVGS), mask=inside)
    tl.store(v_ptr + offs, v.to(EXP_AVG_SQS), mask=inside)
    if VALUES == tl.bfloat16:
        p, residual = parted(p, dither)
        tl.store(residual_ptr + offs, residual, mask=inside)
    tl.store(p_ptr + offs, p, mask=inside)
    tl.store(dense_ptr + index, converted(p, VALUES, DENSE), mask=inside)


def adamw_small_step_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    residuals: Sequence[Tensor] | None = None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor = 1.0,
    table: LaunchTable | None = None,
) -> None:
    """Step AdamW with small state and write the values into their dense weights, in one pass.

    One launch for each combination of dtypes; all tensors on one device. Arguments as in
    `reference_adamw.adamw_small_step_`, indices also int32. There is none over bitmaps: a
    program of theirs sees parts of the blocks of 256 compact entries that share a scale.

    Raises:
        ValueError: a dtype, size, stride or device is not as there, or step is not positive.
    """
    nnz = [index.numel() for index in indices]
    spans = [triton.cdiv(length, small_state.BLOCK) for length in nnz]
    eight_bit = exp_avg_scales is not None and exp_avg_sq_scales is not None
    moments = (torch.int8, torch.uint8) if eight_bit else (torch.float32, torch.float32)
    # A column that is not given is not read either: others stand in its place.
    scales = [
        Column(name, given, [torch.float32], spans)
        if eight_bit and given is not None
        else Column(name, grads, [torch.float32, torch.bfloat16])
        for name, given in (
            ("exp_avg_scales", exp_avg_scales),
            ("exp_avg_sq_scales", exp_avg_sq_scales),
        )
    ]
    master = [torch.float32] if residuals is None else [torch.bfloat16]
    columns = [
        Column("dense", denses, [*FLOATS]),
        Column("indices", indices, [*INDICES]),
        Column("values", values, master, nnz),
        Column("grads", grads, [torch.float32, torch.bfloat16], nnz),
        Column("exp_avgs", exp_avgs, moments[:1], nnz),
        Column("exp_avg_sqs", exp_avg_sqs, moments[1:], nnz),
        *scales,
        Column("residuals", values, master)
        if residuals is None
        else Column("residuals", residuals, [torch.int8], nnz),
    ]
    numbers = scalars(step, lr, beta1, beta2, eps, weight_decay)
    if values:
        scale = scale_tensor(grad_scale, values[0].device)
        dither = float(small_state.dither(step))
        launch(
            _adamw_small_kernel,
            columns,
            nnz,
            table,
            scale,
            *numbers,
            dither,
            search=SEARCH,
        )
