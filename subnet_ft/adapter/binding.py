"""How autograd sees a masked weight: one graph edge from the weight to its compact values.

The owner of a bound parameter (a Linear, an embedding, a norm, ...) gets a class of its own with a
property under the parameter's name. Read while gradients are on, it gives the same storage as the
parameter, attached to the compact values; else the parameter itself. No module is wrapped, so state
dict keys, ``isinstance`` and tied weights stay what they were.
"""

import sys
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subnet_ft.adapter.gradients import gathered_gradients
from subnet_ft.adapter.linear import is_linear, linear_forward, product_dtype
from subnet_ft.adapter.quantized import is_quantized_linear
from subnet_ft.adapter.quantized_linear import quantized_forward
from subnet_ft.errors import UnsupportedError

if TYPE_CHECKING:
    from subnet_ft.adapter.layer import SubnetLayer

_GET_PARAMETER = nn.Module.get_parameter.__code__
_SIDECARS = "_subnet_sidecars"  # owner.__dict__: {leaf: SubnetLayer}; a plain dict hides tied uses
_classes: dict[tuple[type, frozenset[str]], type] = {}


class Bind(torch.autograd.Function):
    """Forward: the weight as it is, no copy. Backward: dense gradient -> compact gradients."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, sidecar: "SubnetLayer", *values: torch.Tensor
    ) -> torch.Tensor:
        """Attach ``values`` to ``weight``'s storage.

        Args:
            ctx: Autograd's context.
            weight: Any shape; already holds ``values`` at their indices.
            sidecar: Whose live adapters ``values`` are.
            *values: (nnz,) float32 each.

        Returns:
            ``weight.data``: the same storage with a version counter of its own, so that writes into
            the weight between forward and backward (a reference model's pass) are legal; what
            autograd then no longer guards, ``sidecar.recall`` does.
        """
        ctx.sidecar, ctx.mark = sidecar, sidecar.mark()
        return weight.data

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gather the dense gradient into one compact gradient per adapter, and drop it.

        Raises:
            StaleGraphError: The weight holds other values than when the forward pass used it.
        """
        (gradient,) = gradients
        subnets = ctx.sidecar.recall(ctx.mark)
        needed = ctx.needs_input_grad[2:]
        return None, None, *gathered_gradients(subnets, needed, gradient, gradient.dtype)


def bind_owner(owner: nn.Module, leaf: str, sidecar: "SubnetLayer") -> None:
    """Route reads of ``owner.<leaf>`` through ``sidecar``."""
    owner.__dict__.setdefault(_SIDECARS, {})[leaf] = sidecar
    owner.__class__ = _bound_class(original_class(owner), frozenset(owner.__dict__[_SIDECARS]))
    _follow_class(owner)


def release_owner(owner: nn.Module, leaf: str) -> None:
    """Undo `bind_owner`; the last release gives the owner its original class back."""
    original = original_class(owner)
    del owner.__dict__[_SIDECARS][leaf]
    remaining = frozenset(owner.__dict__[_SIDECARS])
    if remaining:
        owner.__class__ = _bound_class(original, remaining)
    else:
        del owner.__dict__[_SIDECARS]
        owner.__class__ = original
    _follow_class(owner)


def sidecar_of(owner: nn.Module, leaf: str) -> "SubnetLayer | None":
    """Return the sidecar bound to ``owner.<leaf>``, if any."""
    return owner.__dict__.get(_SIDECARS, {}).get(leaf)


def original_class(owner: nn.Module) -> type:
    """Return the class the owner of a bound parameter had before, and has to the eye."""
    return getattr(type(owner), "_subnet_original", type(owner))


def _follow_class(owner: nn.Module) -> None:
    """Have accelerate's hooks, which keep the forward they found, run the one of the class."""
    if "_old_forward" in owner.__dict__:
        owner.__dict__["_old_forward"] = MethodType(type(owner).forward, owner)


def _bound_class(original: type, leaves: frozenset[str]) -> type:
    key = (original, leaves)
    if key not in _classes:
        members: dict[str, Any] = {}
        if is_quantized_linear(original):  # which reads and replaces its own parameters
            members["forward"] = _quantized_forward
        else:
            members = {leaf: property(_reader(leaf), _refuse) for leaf in leaves}
            members["_parameters"] = property(_settled_parameters)
            if "weight" in leaves and is_linear(original):
                members["forward"] = _linear_forward
        # Prints, error messages and name checks should show the class the user knows.
        members |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
        _classes[key] = type(
            original.__name__, (original,), members | {"_subnet_original": original}
        )
    return _classes[key]


def _refuse(owner: nn.Module, value: Any) -> None:
    raise UnsupportedError(
        f"{type(owner).__name__}: expected a Parameter for a masked weight, found "
        f"{type(value).__name__} (nn.DataParallel and FSDP 1 set such); use DDP or FSDP 2"
    )


def _linear_forward(owner: Any, input: torch.Tensor) -> torch.Tensor:
    sidecar: SubnetLayer = owner.__dict__[_SIDECARS]["weight"]
    if torch.is_grad_enabled():
        weight = owner.__dict__["_parameters"]["weight"]
        cast = product_dtype(weight) != weight.dtype
        if sidecar.computes_weight_grad or (cast and sidecar.learns):
            return linear_forward(owner, input, sidecar)
    elif sidecar.deferred:
        return nn.functional.linear(input, sidecar.base_once(), owner.bias)
    return nn.Linear.forward(owner, input)


def _quantized_forward(owner: Any, x: torch.Tensor) -> torch.Tensor:
    sidecars = owner.__dict__[_SIDECARS]
    return quantized_forward(owner, x, sidecars.get("weight"), sidecars.get("bias"))


def _settled_parameters(owner: nn.Module) -> Any:
    """Have whoever lists parameters (a state dict, an optimizer) find them as they should be."""
    if not torch.compiler.is_compiling():  # which lists them to guard them
        for sidecar in owner.__dict__[_SIDECARS].values():
            sidecar.settle()
    return owner.__dict__["_parameters"]


def _reader(leaf: str) -> Any:
    def read(owner: nn.Module) -> torch.Tensor:
        sidecar: SubnetLayer = owner.__dict__[_SIDECARS][leaf]
        sidecar.settle()
        weight: torch.Tensor = owner.__dict__["_parameters"][leaf]
        if not torch.is_grad_enabled():
            return weight
        # `get_parameter` takes no tensor for a Parameter, and its callers mean the Parameter.
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _GET_PARAMETER:
            return weight
        return sidecar.bind(weight)

    return read
