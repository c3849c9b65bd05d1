"""Torch twins of the operations over bitmaps, with the kernels' signatures."""

from collections.abc import Sequence

from torch import Tensor

from . import reference, reference_adamw
from .encoding import Bitmap, decode_bitmap


def gather_bitmap(dense: Tensor, bitmap: Bitmap, out: Tensor, accumulate: bool = False) -> Tensor:
    """Read the kept entries of a dense tensor, in row-major order: `reference.gather`.

    Args:
        dense: any shape, floating point, contiguous.
        bitmap: which of its elements are kept.
        out: (nnz,) any floating dtype.
        accumulate: Add to ``out`` instead of overwriting it.

    Returns:
        ``out``.
    """
    return reference.gather(dense, decode_bitmap(bitmap), out, accumulate)


def scatter_bitmap_(dense: Tensor, bitmap: Bitmap, values: Tensor) -> Tensor:
    """Write compact values into the kept entries of a dense tensor: `reference.scatter_`.

    Args:
        dense: any shape, floating point, contiguous; changed in place at kept entries only.
        bitmap: which of its elements are kept.
        values: (nnz,) any floating dtype.

    Returns:
        ``dense``.
    """
    return reference.scatter_(dense, decode_bitmap(bitmap), values)


def gather_bitmap_many(
    denses: Sequence[Tensor],
    bitmaps: Sequence[Bitmap],
    outs: Sequence[Tensor],
    accumulate: bool = False,
    table: object = None,
) -> Sequence[Tensor]:
    """Do `gather_bitmap` of each tensor; `table` is the kernel's."""
    for dense, bitmap, out in zip(denses, bitmaps, outs, strict=True):
        gather_bitmap(dense, bitmap, out, accumulate)
    return outs


def scatter_bitmap_many_(
    denses: Sequence[Tensor],
    bitmaps: Sequence[Bitmap],
    values: Sequence[Tensor],
    table: object = None,
) -> Sequence[Tensor]:
    """Do `scatter_bitmap_` of each tensor; `table` is the kernel's."""
    for dense, bitmap, value in zip(denses, bitmaps, values, strict=True):
        scatter_bitmap_(dense, bitmap, value)
    return denses


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
    table: object = None,
) -> None:
    """Step AdamW and write the weights: `reference_adamw.adamw_step_` over decoded bitmaps."""
    indices = [decode_bitmap(bitmap) for bitmap in bitmaps]
    reference_adamw.adamw_step_(
        values,
        grads,
        exp_avgs,
        exp_avg_sqs,
        denses,
        indices,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
    )
