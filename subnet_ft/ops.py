"""The one door to the operations on masked tensors.

``BACKENDS`` holds every implementation by name; ``backend()`` tells which one serves a device.
Today that is the torch twin on every device.
"""

import torch

from subnet_ft.errors import ConfigError
from subnet_kernels import reference

BACKENDS = {"torch": reference}
INDEX_DTYPE = torch.int64  # torch's index_copy_ takes nothing smaller


def backend(name: str | None = None) -> str:
    """Name the implementation that serves the operations.

    Args:
        name: Force this one; None chooses.

    Raises:
        ConfigError: No such implementation.
    """
    chosen = name or "torch"
    if chosen not in BACKENDS:
        raise ConfigError(f"expected a backend of {sorted(BACKENDS)}, found {chosen!r}")
    return chosen


def gather(
    dense: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    accumulate: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Read entries of a dense tensor into a compact one: ``subnet_kernels.reference.gather``."""
    return BACKENDS[backend(impl)].gather(dense, indices, out, accumulate)


def scatter_(
    dense: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Write compact values into a dense tensor: ``subnet_kernels.reference.scatter_``."""
    return BACKENDS[backend(impl)].scatter_(dense, indices, values)
