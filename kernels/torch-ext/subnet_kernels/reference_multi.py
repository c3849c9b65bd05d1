"""Torch twins of the operations over many tensors, with the kernels' signatures.

`table` is the kernels' cache of pointers; a twin has no use for it.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from . import reference


def gather_many(
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    outs: Sequence[Tensor],
    accumulate: bool = False,
    table: object = None,
) -> Sequence[Tensor]:
    """Gather from many tensors: `reference.gather` of each."""
    for dense, index, out in zip(denses, indices, outs, strict=True):
        reference.gather(dense, index, out, accumulate)
    return outs


def scatter_many_(
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    table: object = None,
) -> Sequence[Tensor]:
    """Scatter into many tensors: `reference.scatter_` of each."""
    for dense, index, value in zip(denses, indices, values, strict=True):
        reference.scatter_(dense, index, value)
    return denses


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
    table: object = None,
) -> None:
    """Step AdamW on compact values and write them, rounded, into their dense weights.

    With g = grad_scale * grad, in the order of torch's fused AdamW::

        p -= lr * weight_decay * p
        m += (g - m) * (1 - beta1)
        v  = beta2 * v + (1 - beta2) * g * g
        p -= lr / (1 - beta1**step) * m / (sqrt(v) / sqrt(1 - beta2**step) + eps)
        dense.flatten()[indices] = p

    Args:
        values: each (nnz,) float32, contiguous; p, changed in place.
        grads: each (nnz,) float32, contiguous.
        exp_avgs: each (nnz,) float32, contiguous; m, changed in place.
        exp_avg_sqs: each (nnz,) float32, contiguous; v, changed in place.
        denses: each of any shape, float32|bfloat16|float16, contiguous; changed at `indices` only.
        indices: each (nnz,) int64, flat positions in the dense weight, none twice.
        step: how many steps with this one, from 1.
        lr: learning rate.
        beta1: decay of m.
        beta2: decay of v.
        eps: added to the denominator.
        weight_decay: decoupled, a factor of lr.
        grad_scale: multiplies the gradients: 1 / loss scale, or clipping's coefficient. A tensor
            of one float32 on the gradients' device spares waiting for it.
        table: unused.
    """
    bias2_sqrt = math.sqrt(1 - beta2**step)
    step_size = lr / (1 - beta1**step)
    for p, grad, m, v, dense, index in zip(
        values, grads, exp_avgs, exp_avg_sqs, denses, indices, strict=True
    ):
        g = grad * grad_scale
        p.sub_(p, alpha=lr * weight_decay)
        m.add_(g - m, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_(bias2_sqrt).add_(eps), value=-step_size)
        reference.scatter_(dense, index, p)
