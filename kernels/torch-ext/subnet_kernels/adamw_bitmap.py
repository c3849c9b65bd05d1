"""adamw_bitmap_step_: the step of `adamw` over bitmaps, for densities above ~3%: see `encoding`."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._jit import find_work, pointer, rounded
from ._launch import LaunchTable, launch
from .adamw import adamw_update, scalars, scale_tensor, state_columns
from .bitmap import CONFIG, bitmap_columns, kept_of
from .encoding import Bitmap


@triton.jit
def _adamw_bitmap_kernel(
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
    BITS: tl.constexpr,
    OFFSETS: tl.constexpr,
    VALUES: tl.constexpr,
    GRADS: tl.constexpr,
    EXP_AVGS: tl.constexpr,
    EXP_AVG_SQS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute `adamw_update` of every kept entry, then ``dense[i] = round(p[place(i)])``.

    Grid: one program for BLOCK = 1024 dense elements of one tensor. Table columns: dense, bits,
    offsets, values, grads, exp_avgs, exp_avg_sqs. Bytes an entry at density d: 0.13 / d (bits and
    offsets) + 16 (p, g, m, v) read, 12 (p, m, v) written; a 32-byte sector of dense read and
    written, shared by its neighbours. Twin: ``reference_bitmap.adamw_bitmap_step_``.
    """
    row_ptr, block, start, length = find_work(table_ptr, tensor_of_ptr, 7, BLOCK)
    dense_ptr = pointer(row_ptr, 0, DENSE)
    p_ptr = pointer(row_ptr, 3, VALUES)
    g_ptr = pointer(row_ptr, 4, GRADS)
    m_ptr = pointer(row_ptr, 5, EXP_AVGS)
    v_ptr = pointer(row_ptr, 6, EXP_AVG_SQS)

    offs, kept, place = kept_of(row_ptr, block, start, length, BLOCK)
    g = tl.load(g_ptr + place, mask=kept, other=0.0) * tl.load(scale_ptr)
    p = tl.load(p_ptr + place, mask=kept, other=0.0)
    m = tl.load(m_ptr + place, mask=kept, other=0.0)
    v = tl.load(v_ptr + place, mask=kept, other=0.0)
    p, m, v = adamw_update(p, g, m, v, decay, lerp1, beta2, weight2, bias2_sqrt, eps, step_size)
    tl.store(p_ptr + place, p, mask=kept)
    tl.store(m_ptr + place, m, mask=kept)
    tl.store(v_ptr + place, v, mask=kept)
    tl.store(dense_ptr + offs, rounded(p, DENSE), mask=kept)


def adamw_bitmap_step_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    denses: Sequence[Tensor],
    bitmaps: Sequence[Bitmap],
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

    Arguments as in `adamw.adamw_step_`, with a bitmap in place of indices. The compact tensors of
    a row must agree in size, and with their bitmap, which is taken on trust.

    Raises:
        ValueError: a dtype, size, stride or device is not as above, or step is not positive.
    """
    columns, lengths = bitmap_columns("values", denses, bitmaps, values)
    nnz = [value.numel() for value in values]
    columns[-1:] = state_columns(values, grads, exp_avgs, exp_avg_sqs, nnz)
    numbers = scalars(step, lr, beta1, beta2, eps, weight_decay)
    if values:
        scale = scale_tensor(grad_scale, values[0].device)
        launch(_adamw_bitmap_kernel, columns, lengths, table, scale, *numbers, config=CONFIG)
