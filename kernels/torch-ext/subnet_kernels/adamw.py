"""adamw_step_: AdamW on compact values and the write into their dense weights, in one pass."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._jit import find_work, pointer, rounded
from ._launch import FLOATS, INDICES, Column, LaunchTable, launch


@triton.jit
def adamw_update(
    p: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    decay: tl.tensor,
    lerp1: tl.tensor,
    beta2: tl.tensor,
    weight2: tl.tensor,
    bias2_sqrt: tl.tensor,
    eps: tl.tensor,
    step_size: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """Return p, m, v after a step: see `reference_adamw.adamw_step_`, in fp32.

    Square root and division round to nearest, as torch's do.
    """
    p -= decay * p
    m += (g - m) * lerp1
    v = beta2 * v + weight2 * g * g
    denom = tl.div_rn(tl.sqrt_rn(v), bias2_sqrt) + eps
    p -= tl.div_rn(step_size * m, denom)
    return p, m, v


@triton.jit
def _adamw_kernel(
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
    DENSE: tl.constexpr,
    INDEX: tl.constexpr,
    VALUES: tl.constexpr,
    GRADS: tl.constexpr,
    EXP_AVGS: tl.constexpr,
    EXP_AVG_SQS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute `adamw_update` of every entry of a table, then ``dense[indices[i]] = round(p[i])``.

    Grid: one program for BLOCK entries of one tensor. Table columns: dense, indices, values, grads,
    exp_avgs, exp_avg_sqs. Bytes an entry: 4 or 8 (index) + 16 (p, g, m, v) read, 12 (p, m, v)
    written; a 32-byte sector of dense read and written, shared by its neighbours.
    Twin: ``reference_adamw.adamw_step_``.
    """
    row_ptr, _, start, length = find_work(table_ptr, tensor_of_ptr, 6, BLOCK)
    dense_ptr = pointer(row_ptr, 0, DENSE)
    indices_ptr = pointer(row_ptr, 1, INDEX)
    p_ptr = pointer(row_ptr, 2, VALUES)
    g_ptr = pointer(row_ptr, 3, GRADS)
    m_ptr = pointer(row_ptr, 4, EXP_AVGS)
    v_ptr = pointer(row_ptr, 5, EXP_AVG_SQS)

    offs = start + tl.arange(0, BLOCK)
    inside = offs < length
    index = tl.load(indices_ptr + offs, mask=inside, other=0).to(tl.int64)
    g = tl.load(g_ptr + offs, mask=inside, other=0.0) * tl.load(scale_ptr)
    p = tl.load(p_ptr + offs, mask=inside, other=0.0)
    m = tl.load(m_ptr + offs, mask=inside, other=0.0)
    v = tl.load(v_ptr + offs, mask=inside, other=0.0)
    p, m, v = adamw_update(p, g, m, v, decay, lerp1, beta2, weight2, bias2_sqrt, eps, step_size)
    tl.store(p_ptr + offs, p, mask=inside)
    tl.store(m_ptr + offs, m, mask=inside)
    tl.store(v_ptr + offs, v, mask=inside)
    tl.store(dense_ptr + index, rounded(p, DENSE), mask=inside)


def adamw_step_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor = 1.0,
    table: LaunchTable | None = None,
) -> None:
    """Step AdamW on compact values and write them, rounded, into their dense weights.

    One launch for each combination of dtypes; all tensors on one device. The formula is that of
    `reference_adamw.adamw_step_`.

    Args:
        values: each (nnz,) float32, contiguous; changed in place.
        grads: each (nnz,) float32, contiguous.
        exp_avgs: each (nnz,) float32, contiguous; changed in place.
        exp_avg_sqs: each (nnz,) float32, contiguous; changed in place.
        denses: each of any shape, float32|bfloat16|float16, contiguous; changed at `indices` only.
        indices: each (nnz,) int32|int64.
        step: how many steps with this one, from 1.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second.
        eps: added to the denominator.
        weight_decay: decoupled.
        grad_scale: multiplies the gradients; a tensor of one float32 spares waiting for it.
        table: Keeps the pointers between calls; None builds them anew.

    Raises:
        ValueError: a dtype, size, stride or device is not as above, or step is not positive.
    """
    nnz = [index.numel() for index in indices]
    columns = [
        Column("dense", denses, [*FLOATS]),
        Column("indices", indices, [*INDICES]),
        *state_columns(values, grads, exp_avgs, exp_avg_sqs, nnz),
    ]
    numbers = scalars(step, lr, beta1, beta2, eps, weight_decay)
    if values:
        scale = scale_tensor(grad_scale, values[0].device)
        launch(_adamw_kernel, columns, nnz, table, scale, *numbers)


def state_columns(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    nnz: Sequence[int],
) -> list[Column]:
    """Return the compact columns of a step, each tensor float32 with its `nnz` entries."""
    return [
        Column("values", values, [torch.float32], nnz),
        Column("grads", grads, [torch.float32], nnz),
        Column("exp_avgs", exp_avgs, [torch.float32], nnz),
        Column("exp_avg_sqs", exp_avg_sqs, [torch.float32], nnz),
    ]


def scalars(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Return the numbers `adamw_update` takes, worked out in double precision as torch does.

    All are float: a kernel would be compiled anew for an int.

    Raises:
        ValueError: step is not positive.
    """
    if step < 1:
        raise ValueError(f"step: expected 1 or more, got {step}; count the step being taken.")
    return (
        float(lr * weight_decay),
        1.0 - beta1,
        float(beta2),
        1.0 - beta2,
        math.sqrt(1 - beta2**step),
        float(eps),
        lr / (1 - beta1**step),
    )


def scale_tensor(grad_scale: float | Tensor, device: torch.device) -> Tensor:
    """Return a gradient scale as one float32 on the device, without waiting for the device."""
    if isinstance(grad_scale, Tensor):
        return grad_scale.to(device, torch.float32)
    return torch.full((), grad_scale, dtype=torch.float32, device=device)
