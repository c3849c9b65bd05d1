"""Torch twins of compact AdamW with the write into the weights, with the kernels' signatures.

`table` is the kernels' cache of pointers; a twin has no use for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import small_state
from .reference_multi import scatter_many_

STRETCH = 1 << 17  # entries stepped at a time with small state: no more of them exist in fp32


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

    With g = grad_scale * grad, by torch's fused AdamW::

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
            None at all, here but not in the kernel: nothing to write.
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
    update_(
        values,
        scaled(grads, grad_scale),
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )
    if denses:
        scatter_many_(denses, indices, values)


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
    table: object = None,
) -> None:
    """Do `adamw_step_` with small state: 8-bit moments, bf16 values with a residual, or both.

    Args:
        values: each (nnz,) float32, with `residuals` bfloat16, contiguous; changed in place.
        grads: each (nnz,) float32|bfloat16, contiguous.
        exp_avgs: each (nnz,) float32, with scales int8, contiguous; changed in place.
        exp_avg_sqs: each (nnz,) float32, with scales uint8, contiguous; changed in place.
        denses: as in `adamw_step_`.
        indices: as in `adamw_step_`.
        exp_avg_scales: each (ceil(nnz / 256),) float32, see `small_state`; None: moments are fp32.
        exp_avg_sq_scales: alike; both or none.
        residuals: each (nnz,) int8; None: values are fp32.
        step: how many steps with this one, from 1; also turns the rounding.
        lr: learning rate.
        beta1: decay of m.
        beta2: decay of v.
        eps: added to the denominator.
        weight_decay: decoupled, a factor of lr.
        grad_scale: multiplies the gradients.
        table: unused.
    """
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    for row, value in enumerate(values):
        state = {
            "values": value,
            "grads": grads[row],
            "exp_avgs": exp_avgs[row],
            "exp_avg_sqs": exp_avg_sqs[row],
        }
        scales = {}
        if exp_avg_scales is not None and exp_avg_sq_scales is not None:
            scales = {"exp_avgs": exp_avg_scales[row], "exp_avg_sqs": exp_avg_sq_scales[row]}
        if residuals is not None:
            state["residuals"] = residuals[row]
        # One tensor at a time, some entries at a time: only theirs exist in fp32.
        for start in range(0, value.numel(), STRETCH):
            end, block = start + STRETCH, small_state.BLOCK
            own, blocks = slice(start, end), slice(start // block, end // block)
            small_update_(
                {name: tensor[own] for name, tensor in state.items()},
                {name: tensor[blocks] for name, tensor in scales.items()},
                grad_scale,
                step=step,
                **numbers,
            )
    if denses:
        scatter_many_(denses, indices, values)


def small_update_(
    state: dict[str, Tensor],
    scales: dict[str, Tensor],
    grad_scale: float | Tensor,
    *,
    step: int,
    **numbers: float,
) -> None:
    """Step one tensor's entries in fp32 and put them back small.

    Args:
        state: values, grads, exp_avgs, exp_avg_sqs, perhaps residuals; changed in place.
        scales: of the moments, empty where they are fp32; changed in place.
        grad_scale: multiplies the gradients.
        step: how many steps with this one.
        numbers: as `update_` takes.
    """
    values, residual = state["values"], state.get("residuals")
    exact = values if residual is None else small_state.join(values, residual)
    moments = [state["exp_avgs"], state["exp_avg_sqs"]]
    if scales:
        pairs = zip(moments, scales.values(), strict=True)
        moments = [small_state.dequantize(*pair) for pair in pairs]
    grads = scaled([state["grads"].float()], grad_scale)
    update_([exact], grads, moments[:1], moments[1:], step=step, **numbers)
    if scales:
        small = small_state.quantize_exp_avg(moments[0])
        small_sq = small_state.quantize_exp_avg_sq(moments[1], step)
        for name, (codes, scale) in zip(scales, (small, small_sq), strict=True):
            state[name].copy_(codes)
            scales[name].copy_(scale)
    if residual is not None:
        new_values, new_residual = small_state.split(exact, small_state.dither(step))
        values.copy_(new_values)
        residual.copy_(new_residual)


def update_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Step AdamW in place, all fp32 and on one device: what ``AdamW(fused=True)`` calls."""
    if values:
        count = torch.full((), float(step), device=values[0].device)  # read, not counted up
        torch._fused_adamw_(
            list(values),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            [count] * len(values),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


def scaled(grads: Sequence[Tensor], grad_scale: float | Tensor) -> Sequence[Tensor]:
    """Return the gradients times a scale, themselves where it is the number 1."""
    if isinstance(grad_scale, float) and grad_scale == 1:
        return grads
    return [grad * grad_scale for grad in grads]
