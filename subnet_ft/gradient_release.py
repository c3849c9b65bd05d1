"""Gradient release: step each parameter as soon as its gradient is complete, and drop the gradient.

No more than one compact gradient then exists at a time. What would need all of them at once, or the
same one twice, is refused (LOMO, arXiv 2306.09782, section 3, names the same limits).
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from subnet_ft.adapter.registry import Registry
from subnet_ft.errors import UnsupportedError

_HANDLE = "_subnet_release"  # attribute of a parameter: the hook that steps it


class ReleasedGradient(torch.Tensor):
    """Stands where a gradient was: has its shape, no storage, and refuses to be read."""

    @staticmethod
    def __new__(cls, parameter: torch.Tensor) -> "ReleasedGradient":
        """Stand for the gradient of ``parameter``."""
        return torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse, but for clipping to an infinite norm, as a Trainer does to log the norm.

        Raises:
            UnsupportedError: Whatever else is called.
        """
        if function is torch.ops.aten.detach.default:
            return args[0]  # what assigning to .grad does
        if function is torch.ops.aten.linalg_vector_norm.default:
            # The norm is gone. As infinity it makes the coefficient of clipping to infinity NaN,
            # and that of clipping to anything else 0.
            return torch.full((), torch.inf, device=args[0].device)
        if function is torch.ops.aten.mul_.Tensor and args[1].isnan():
            return args[0]
        raise UnsupportedError(
            "release_gradients: expected no reader of gradients, which are dropped as each is "
            f"stepped, found {function}: clipping, accumulation or a GradScaler; set "
            "max_grad_norm=0, gradient_accumulation_steps=1 and fp16=False, and start again, or "
            "use release_gradients=False"
        )

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"ReleasedGradient(shape={tuple(self.shape)})"


class Release:
    """Hooks that step an optimizer's parameters during backward.

    Args:
        step: Steps the one parameter it is given, of the group with the given number.
        registry: Finds its sidecar.

    Raises:
        UnsupportedError: Several processes train together.
    """

    def __init__(self, step: Callable[[torch.Tensor, int], None], registry: Registry) -> None:
        self.step, self.registry = step, registry
        _check_alone()

    def watch(self, parameters: Iterable[torch.Tensor], group: int) -> None:
        """Step these as their gradients come; an optimizer that did so before no longer does.

        Args:
            parameters: Of one group.
            group: Its number: loading a state puts another dict in the group's place.
        """
        for parameter in parameters:
            if before := getattr(parameter, _HANDLE, None):
                before.remove()
            hook = partial(self._after_gradient, group=group)
            setattr(parameter, _HANDLE, parameter.register_post_accumulate_grad_hook(hook))

    @torch.no_grad()
    def _after_gradient(self, parameter: torch.Tensor, group: int) -> None:
        _check_alone()
        layer = self.registry.layer(parameter)
        if layer and any(subnet.offmask is not None for subnet in layer.live_subnets):
            raise UnsupportedError(
                'release_gradients: expected clip="compact", found clip="dense", which is for '
                "gradient clipping; nothing is left to clip"
            )
        self.step(parameter, group)
        parameter.grad = ReleasedGradient(parameter)


def _check_alone() -> None:
    """Refuse what can be seen before anything is stepped."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedError(
            f"release_gradients: expected one process, found {dist.get_world_size()}, which would "
            "step before averaging their gradients; use release_gradients=False"
        )
    if state := sys.modules.get("accelerate.state"):
        if not state.GradientState().sync_gradients:
            raise UnsupportedError(
                "release_gradients: expected gradient_accumulation_steps=1, found a backward pass "
                "without a step; use a larger batch or release_gradients=False"
            )
