"""Kernels that run here: compiled where there is a GPU, else interpreted on the CPU.

Import it before `subnet_kernels.jitted`: what a kernel is, is settled when it is defined.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers import assert_same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from subnet_kernels import (  # noqa: E402
    adamw,
    adamw_bitmap,
    adamw_small,
    bitmap,
    gather,
    scatter,
    weight_grad,
)
from subnet_kernels import jitted as jitted  # noqa: E402
from subnet_kernels._tune import is_interpreted  # noqa: E402

KERNELS = (
    adamw._adamw_kernel,
    adamw_bitmap._adamw_bitmap_kernel,
    adamw_small._adamw_small_kernel,
    bitmap._gather_bitmap_kernel,
    bitmap._scatter_bitmap_kernel,
    gather._gather_kernel,
    scatter._scatter_kernel,
    weight_grad._weight_grad_kernel,
)
assert DEVICE == "cuda" or all(map(is_interpreted, KERNELS)), "kernels imported too early"

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INDICES = [torch.int32, torch.int64]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """A dense tensor and which of its entries are kept."""

    shape: tuple[int, ...]
    keep: str  # one, last, all, third (every third)

    @property
    def id(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.keep}"

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def indices(self, dtype: torch.dtype = torch.int64) -> Tensor:
        positions: Iterable[int] = {
            "one": [self.numel // 2],
            "last": [self.numel - 1],
            "all": range(self.numel),
            "third": range(0, self.numel, 3),
        }[self.keep]
        return torch.tensor(list(positions), dtype=dtype, device=DEVICE)


def poisoned(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN everywhere: an entry that is read or left unwritten shows."""
    return torch.full((numel,), float("nan"), dtype=dtype, device=DEVICE)


def assert_no_worse(
    truth: Sequence[Tensor], twin: Sequence[Tensor], kernel: Sequence[Tensor], tolerance: float
) -> None:
    """The kernel's largest error is the twin's at most, but for `tolerance` of the largest value.

    Args:
        truth: float64.
        twin: what the torch twin made of the same input.
        kernel: what the kernel made of it.
        tolerance: relative to the largest true value.
    """
    for i, (true, expected, found) in enumerate(zip(truth, twin, kernel, strict=True)):
        if not true.numel():
            continue
        allowed = (expected.double() - true).abs().max() + tolerance * true.abs().max()
        error = (found.double() - true).abs().max()
        assert error <= allowed, f"tensor {i}: error {error:.3g}, allowed {allowed:.3g}"


def dense_of(case: Case, dtype: torch.dtype) -> Tensor:
    return torch.randn(case.shape).to(DEVICE, dtype)


def assert_only_changed(before: Tensor, after: Tensor, indices: Tensor) -> None:
    outside = torch.ones(before.numel(), dtype=torch.bool, device=DEVICE)
    outside[indices.long()] = False
    assert_same_bits(before.flatten()[outside], after.flatten()[outside], "off the mask")


def tensors_of_many_sizes() -> tuple[list[Tensor], list[Tensor]]:
    """Six weights in three dtypes; the third keeps nothing, the fourth has nothing."""
    denses, indices = [], []
    for i, numel in enumerate((700, 1, 33, 0, 257, 2049)):
        dtype = FLOATS[i % 2 if numel else 2]
        denses.append(torch.randn(numel).to(DEVICE, dtype))
        kept = torch.arange(0, numel if i != 2 else 0, 1 + i % 3, dtype=INDICES[i % 2])
        indices.append(kept.to(DEVICE))
    return denses, indices


def adamw_truth(states: list[list[Tensor]], step: int, scale: float) -> None:
    """The step in float64, in place: values, grads, exp_avgs, exp_avg_sqs."""
    b1, b2 = HYPER["beta1"], HYPER["beta2"]
    for p, grad, m, v in zip(*states, strict=True):
        g = grad * scale
        p.mul_(1 - HYPER["lr"] * HYPER["weight_decay"])
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).add_(g * g, alpha=1 - b2)
        denom = (v / (1 - b2**step)).sqrt() + HYPER["eps"]
        p.sub_(HYPER["lr"] / (1 - b1**step) * m / denom)
