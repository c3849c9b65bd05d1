"""The one door to the operations on masked tensors.

Two implementations under the same names: ``"torch"``, the twins, and ``"triton"``, the kernels.
`backend` tells which one serves; that is torch on every device until the kernels have been measured
on one. ``impl=`` forces either for one call, the environment's ``SUBNET_FT_BACKEND`` for all.
"""

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

import subnet_kernels
from subnet_ft.errors import ConfigError
from subnet_kernels import _ops

BACKENDS = {"torch": "twins", "triton": "jitted"}
INDEX_DTYPE = torch.int64  # torch's index_copy_ takes nothing smaller


def backend(name: str | None = None) -> str:
    """Name the implementation that serves the operations.

    Args:
        name: Force this one; None takes that of ``SUBNET_FT_BACKEND``, else chooses.

    Raises:
        ConfigError: No such implementation.
    """
    chosen = name or os.environ.get("SUBNET_FT_BACKEND") or "torch"
    if chosen not in BACKENDS:
        raise ConfigError(
            f"expected a backend of {sorted(BACKENDS)}, found {chosen!r}; "
            "correct impl= or SUBNET_FT_BACKEND"
        )
    return chosen


def _serving(impl: str | None) -> ModuleType:
    module: ModuleType = getattr(subnet_kernels, BACKENDS[backend(impl)])
    return module


def gather(
    dense: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    accumulate: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Read entries of a dense tensor into a compact one: ``subnet_kernels.reference.gather``."""
    result: torch.Tensor = _serving(impl).gather(dense, indices, out, accumulate)
    return result


def weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    tiles: Callable[[], Any] = lambda: None,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Compute a linear layer's weight gradient at its entries alone.

    See ``subnet_kernels.reference_weight_grad.weight_grad``.

    Args:
        dy: (tokens, rows).
        x: (tokens, cols).
        indices: (nnz,).
        tiles: Gives the kernel the same entries by ``encoding.encode_tiles``.
        impl: Force an implementation.
    """
    if backend(impl) == "torch":
        # As an operator: `torch.compile` cannot look into its loop over row chunks.
        result: torch.Tensor = _ops.weight_grad(dy, x, indices)
    else:
        result = _serving(impl).weight_grad(dy, x, indices, tiles=tiles())
    return result


def scatter_many_(
    denses: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    impl: str | None = None,
) -> None:
    """Do `scatter_` of many tensors on one device: ``subnet_kernels.reference_multi``."""
    _serving(impl).scatter_many_(denses, indices, values)


def scatter_(
    dense: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Write compact values into a dense tensor: ``subnet_kernels.reference.scatter_``."""
    result: torch.Tensor = _serving(impl).scatter_(dense, indices, values)
    return result


def adamw_step_(*columns: Sequence[torch.Tensor], impl: str | None = None, **options: Any) -> None:
    """Step AdamW and write the weights: ``subnet_kernels.reference_adamw.adamw_step_``."""
    _serving(impl).adamw_step_(*columns, **options)


def adamw_small_step_(
    *columns: Sequence[torch.Tensor], impl: str | None = None, **options: Any
) -> None:
    """Do so with small state: ``subnet_kernels.reference_adamw.adamw_small_step_``."""
    _serving(impl).adamw_small_step_(*columns, **options)
