"""SubnetAdamW: AdamW over the subnetwork's entries alone, and their way into the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from subnet_ft.errors import ConfigError
from subnet_ft.gradient_release import Release
from subnet_kernels import reference_adamw as small

STATE_BITS = (32, 8)
MASTERS = ("fp32", "residual")
STRETCH = 1 << 17  # entries stepped at a time with small state: no more of them exist in fp32


class SubnetAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` with its fused arithmetic, made for compact values.

    The new values are written into the weights they belong to as after any optimizer's step.
    Parameters that belong to no subnetwork (``modules_to_save``) are stepped alike.

    Args:
        params: Parameters or groups, as for any optimizer.
        lr: Learning rate.
        betas: Decay of the running averages of the gradient and its square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay; reaches masked entries only.
        state_bits: 32: fp32 moments, the arithmetic of ``torch.optim.AdamW(fused=True)`` bit for
            bit. 8: moments in blocks of 256 one-byte codes, at any size.
        master: ``"fp32"``: the values themselves are fp32. ``"residual"``: for
            ``SubnetConfig(values_dtype="bfloat16")``; a signed byte keeps what rounding loses.
        release_gradients: Step each parameter within backward and drop its gradient; `step` then
            only closes the step. One process, no clipping, accumulation or GradScaler.

    Raises:
        ConfigError: An option outside what is listed, or values that do not suit ``master``.
        UnsupportedError: Gradients are read that were released.

    Example:
        >>> trainer.optimizer_cls_and_kwargs = (SubnetAdamW, {"lr": 1e-5})  # doctest: +SKIP
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        master: str = "fp32",
        release_gradients: bool = False,
    ) -> None:
        if state_bits not in STATE_BITS:
            raise ConfigError(f"state_bits: expected one of {STATE_BITS}, found {state_bits!r}")
        if master not in MASTERS:
            raise ConfigError(f"master: expected one of {MASTERS}, found {master!r}")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"expected lr, eps, weight_decay >= 0 and betas in [0, 1), found {lr}, {eps}, "
                f"{weight_decay}, {betas}"
            )
        self.state_bits, self.master = state_bits, master
        self.release_gradients = release_gradients
        if release_gradients:
            self._release = Release(self._step_now)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as to any optimizer."""
        super().add_param_group(param_group)
        if self.release_gradients:
            self._release.watch(self.param_groups[-1]["params"], len(self.param_groups) - 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.release_gradients:
            for group in self.param_groups:
                self._step_group([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _step_now(self, parameter: torch.Tensor, group: int) -> None:
        self._step_group([parameter], self.param_groups[group])

    def _step_group(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        if self.state_bits == 32 and self.master == "fp32":
            self._fused_step(parameters, group)
        else:
            for parameter in parameters:
                self._small_step(parameter, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; released ones cannot be zeroed in place."""
        super().zero_grad(set_to_none or self.release_gradients)

    def _fused_step(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                self._check(parameter)
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        _adamw(
            group,
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
        )

    def _small_step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """One parameter at a time, some entries at a time: only theirs exist in fp32."""
        state = self.state[parameter]
        flat = parameter.detach().view(-1)
        if not state:
            self._check(parameter)
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
                if self.state_bits == 8:
                    state[name] = torch.zeros(flat.numel(), dtype=dtype, device=flat.device)
                    blocks = -(-flat.numel() // small.BLOCK)
                    state[f"{name}_scale"] = torch.zeros(blocks, device=flat.device)
                else:
                    state[name] = torch.zeros(flat.numel(), device=flat.device)
            if self.master == "residual":
                state["residual"] = torch.zeros_like(flat, dtype=torch.int8)
        assert parameter.grad is not None
        gradient = parameter.grad.view(-1)
        before = state["step"].clone()
        for start in range(0, flat.numel(), STRETCH):
            state["step"].copy_(before)  # each stretch counts the same step
            self._stretch_step(flat, gradient, state, start, group)

    def _stretch_step(
        self,
        flat: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, torch.Tensor],
        start: int,
        group: dict[str, Any],
    ) -> None:
        """Step the entries from ``start`` on, STRETCH of them at most."""
        own = slice(start, start + STRETCH)
        blocks = slice(start // small.BLOCK, (start + STRETCH) // small.BLOCK)
        moments = [state["exp_avg"][own], state["exp_avg_sq"][own]]
        if self.state_bits == 8:
            scales = (state["exp_avg_scale"][blocks], state["exp_avg_sq_scale"][blocks])
            moments = [small.dequantize(*pair) for pair in zip(moments, scales, strict=True)]
        residual = self.master == "residual"
        values = small.join(flat[own], state["residual"][own]) if residual else flat[own]
        _adamw(group, [values], [gradient[own].float()], moments[:1], moments[1:], [state["step"]])
        if self.state_bits == 8:
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                codes, scale = small.quantize(moment, signed=name == "exp_avg")
                state[name][own] = codes
                state[f"{name}_scale"][blocks] = scale
        if residual:
            flat[own], state["residual"][own] = small.split(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave.

        Torch would cast all state to the parameter's dtype: codes to floats, scales to bf16.
        """
        super().load_state_dict({**state_dict, "state": {}})
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                if key in state_dict["state"]:
                    state = state_dict["state"][key]
                    self.state[parameter] = {
                        name: value.to(parameter.device if value.ndim else value.device, copy=True)
                        for name, value in state.items()
                    }

    def _check(self, parameter: torch.Tensor) -> None:
        wanted = torch.bfloat16 if self.master == "residual" else torch.float32
        if parameter.dtype != wanted:
            raise ConfigError(
                f"SubnetAdamW(master={self.master!r}): expected {wanted} values, found "
                f"{parameter.dtype}; "
                'use SubnetConfig(values_dtype="bfloat16") with master="residual", else "fp32"'
            )


def _adamw(group: dict[str, Any], *tensors: list[torch.Tensor]) -> None:
    """Torch's fused AdamW on (values, gradients, exp_avgs, exp_avg_sqs, steps), in place."""
    values, gradients, exp_avgs, exp_avg_sqs, steps = tensors
    adamw(
        values,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
