"""The operations as torch operators, so that torch.compile keeps a full graph around them.

Torch twin on the CPU, Triton kernel on a GPU. The namespace is this package's name: a copy loaded
under another one registers operators of its own and leaves these alone.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference, twins
from .reference_weight_grad import weight_grad as weight_grad_twin

NAMESPACE = "".join(c if c.isalnum() else "_" for c in __name__.rpartition(".")[0])
GPUS = ("cuda", "xpu")  # PyTorch calls AMD's cuda


@torch.library.custom_op(f"{NAMESPACE}::gather", mutates_args=(), device_types="cpu")
def gather(dense: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of a dense tensor at `indices`: `reference.gather`.

    Args:
        dense: any shape, float32|bfloat16|float16, contiguous.
        indices: (nnz,) int32|int64, flat positions in `dense`.

    Returns:
        (nnz,) float32.
    """
    return reference.gather(dense, indices)


@torch.library.custom_op(f"{NAMESPACE}::gather_into", mutates_args=("out",), device_types="cpu")
def gather_into(dense: Tensor, indices: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Write the entries of a dense tensor at `indices` into `out`, or add them to it.

    Args:
        dense: any shape, float32|bfloat16|float16, contiguous.
        indices: (nnz,) int32|int64, flat positions in `dense`.
        out: (nnz,) float32|bfloat16|float16, contiguous; changed in place.
        accumulate: add instead of overwriting.
    """
    reference.gather(dense, indices, out, accumulate)


@torch.library.custom_op(f"{NAMESPACE}::scatter_", mutates_args=("dense",), device_types="cpu")
def scatter_(dense: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write compact values into a dense tensor at `indices`: `reference.scatter_`.

    Args:
        dense: any shape, float32|bfloat16|float16, contiguous; changed at `indices` only.
        indices: (nnz,) int32|int64, flat positions in `dense`, none twice.
        values: (nnz,) float32|bfloat16|float16, contiguous.
    """
    reference.scatter_(dense, indices.long(), values)


# The twin on every device: the kernel wants its tiles kept between calls, and is not timed yet.
@torch.library.custom_op(f"{NAMESPACE}::weight_grad", mutates_args=())
def weight_grad(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Return a linear layer's weight gradient at `indices`: `reference_weight_grad.weight_grad`.

    Args:
        dy: (tokens, rows) float32|bfloat16|float16.
        x: (tokens, cols), same dtype.
        indices: (nnz,) int32|int64, flat positions in the (rows, cols) weight.

    Returns:
        (nnz,) float32.
    """
    return weight_grad_twin(dy, x, indices)


@weight_grad.register_fake
def _(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return dy.new_empty(indices.shape, dtype=torch.float32)


@torch.library.custom_op(
    f"{NAMESPACE}::adamw_step_",
    mutates_args=(
        "values",
        "exp_avgs",
        "exp_avg_sqs",
        "denses",
        "exp_avg_scales",
        "exp_avg_sq_scales",
        "residuals",
    ),
    device_types="cpu",
)
def adamw_step_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    denses: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    residuals: Sequence[Tensor],
    grad_scale: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Step AdamW on compact values and write their weights, with fp32 or small state.

    Args: as of `reference_adamw.adamw_small_step_`; lists without a tensor for state that is fp32.
    """
    numbers = (step, lr, beta1, beta2, eps, weight_decay)
    columns = [values, grads, exp_avgs, exp_avg_sqs, denses, indices]
    _step(twins, columns, exp_avg_scales, exp_avg_sq_scales, residuals, grad_scale, numbers)


def _step(
    serving: ModuleType,
    columns: Sequence[Sequence[Tensor]],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    residuals: Sequence[Tensor],
    grad_scale: Tensor,
    numbers: Sequence[float],
) -> None:
    names = ("step", "lr", "beta1", "beta2", "eps", "weight_decay")
    options = {"grad_scale": grad_scale, **dict(zip(names, numbers, strict=True))}
    if not exp_avg_scales and not residuals:
        serving.adamw_step_(*columns, **options)
        return
    serving.adamw_small_step_(
        *columns,
        exp_avg_scales=exp_avg_scales or None,
        exp_avg_sq_scales=exp_avg_sq_scales or None,
        residuals=residuals or None,
        **options,
    )


@adamw_step_.register_fake
def _(*arguments: object) -> None:
    return None


@gather.register_fake
def _(dense: Tensor, indices: Tensor) -> Tensor:
    return dense.new_empty(indices.shape, dtype=torch.float32)


@gather_into.register_fake
def _(dense: Tensor, indices: Tensor, out: Tensor, accumulate: bool = False) -> None:
    return None


@scatter_.register_fake
def _(dense: Tensor, indices: Tensor, values: Tensor) -> None:
    return None


# Triton is imported when a kernel is first wanted.
@gather.register_kernel(GPUS)
def _(dense: Tensor, indices: Tensor) -> Tensor:
    from . import jitted

    return jitted.gather(dense, indices)


@gather_into.register_kernel(GPUS)
def _(dense: Tensor, indices: Tensor, out: Tensor, accumulate: bool = False) -> None:
    from . import jitted

    jitted.gather(dense, indices, out, accumulate)


@scatter_.register_kernel(GPUS)
def _(dense: Tensor, indices: Tensor, values: Tensor) -> None:
    from . import jitted

    jitted.scatter_(dense, indices, values)


@adamw_step_.register_kernel(GPUS)
def _(*arguments: Any) -> None:
    from . import jitted

    columns, (scales, sq_scales, residuals, grad_scale) = arguments[:6], arguments[6:10]
    _step(jitted, columns, scales, sq_scales, residuals, grad_scale, arguments[10:])
