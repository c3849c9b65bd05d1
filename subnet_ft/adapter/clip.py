"""``clip="dense"``: lets gradient clipping see the whole gradient of a masked parameter.

Clipping takes the norm over the gradients of the trainable parameters, which hold masked entries
only, so it bites later than in full finetuning. One extra scalar parameter per masked parameter
carries the norm of what the mask leaves out as its gradient: the norm over both is the dense norm,
in any trainer and with any clipping function that takes an L2 norm. The scalar itself is never
used, and its gradient is dropped before the optimizer steps.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd import Variable

from subnet_ft import ops

if TYPE_CHECKING:
    from subnet_ft.adapter.subnet import Subnet


NAME = "offmask_norm"


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """Return the squared L2 norm of any tensor, summed in fp32, shape () float64."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()


class OffMaskNorm:
    """Measures ``||gradient outside the mask||`` during backward.

    A parameter used in several places gets one gradient a use; their sum is what counts, so they
    are summed (one dense temporary) and measured when backward ends.

    Args:
        subnet: Whose entries are inside the mask; it gains the scalar parameter ``offmask_norm``.
        uses: In how many places the parameter is used.
    """

    def __init__(self, subnet: "Subnet", uses: int) -> None:
        self.subnet, self.uses = subnet, uses
        scalar = nn.Parameter(torch.zeros((), device=subnet.indices.device))
        subnet.register_parameter(NAME, scalar)
        self._sum: torch.Tensor | None = None

    @property
    def scalar(self) -> nn.Parameter:
        """The parameter whose gradient is the norm, shape ()."""
        return self.subnet.get_parameter(NAME)

    def forget(self) -> None:
        """Drop what backward left: clipping has seen it, and nothing trains the scalar."""
        self.scalar.grad = self._sum = None

    def observe(self, gradient: torch.Tensor, compact: torch.Tensor) -> None:
        """Take in the gradient of one use, dense and compact; called from within backward."""
        if self.uses == 1:
            self._measure(gradient, compact)
        elif self._sum is None:
            self._sum = gradient.float()
            Variable._execution_engine.queue_callback(self._measure_sum)
        else:
            self._sum = self._sum + gradient

    def _measure_sum(self) -> None:
        assert self._sum is not None
        self._measure(self._sum, ops.gather(self._sum, self.subnet.indices))
        self._sum = None

    def _measure(self, gradient: torch.Tensor, compact: torch.Tensor) -> None:
        outside = squared_norm(gradient) - squared_norm(compact)
        scalar = self.scalar
        if scalar.grad is not None:  # accumulation: as if micro-batches were orthogonal
            outside = outside + scalar.grad.double().square()
        scalar.grad = outside.clamp(min=0).sqrt().to(scalar.dtype)
