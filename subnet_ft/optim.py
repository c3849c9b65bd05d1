"""SubnetAdamW: AdamW over the subnetwork's entries alone, and their way into the weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from subnet_ft import ops
from subnet_ft.adapter.layer import SubnetLayer
from subnet_ft.adapter.registry import Registry
from subnet_ft.adapter.writing import flush_all
from subnet_ft.errors import ConfigError
from subnet_ft.gradient_release import Release
from subnet_kernels import small_state

STATE_BITS = (32, 8)
MASTERS = ("fp32", "residual")
Pair = tuple[torch.Tensor, SubnetLayer | None]  # a parameter and the sidecar it belongs to


class SubnetAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` with its fused arithmetic, made for compact values.

    A step and the write of the new values into their weights are one operation, for all tensors at
    once. Parameters that belong to no subnetwork (``modules_to_save``) are stepped alike.

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

    writes_weights = (
        True  # the hook that flushes after every optimizer's step leaves it to this one
    )

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
        self._registry = Registry()
        if release_gradients:
            self._release = Release(self._step_now, self._registry)
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
            find = self._registry.layer
            found = [[(p, find(p)) for p in group["params"]] for group in self.param_groups]
            for layer in {layer for pairs in found for _, layer in pairs if layer is not None}:
                layer.forget_norms()
            for pairs, group in zip(found, self.param_groups, strict=True):
                self._step_group([pair for pair in pairs if pair[0].grad is not None], group)
        return loss

    def _step_now(self, parameter: torch.Tensor, group: int) -> None:
        self._step_group([(parameter, self._registry.layer(parameter))], self.param_groups[group])

    def _step_group(self, pairs: list[Pair], group: dict[str, Any]) -> None:
        """Step parameters that have gradients, in one pass those that have made as many steps."""
        if not pairs:
            return
        steps = [(self.state[p] or self._start(p))["step"] for p, _ in pairs]
        torch._foreach_add_(steps, 1)
        alike: dict[tuple[float, bool], list[Pair]] = {}
        for (parameter, layer), step in zip(pairs, torch.stack(steps).tolist(), strict=True):
            # Under several live adapters the weight is not these values: `flush` adds them up. A
            # quantized one holds none.
            alone = layer is not None and layer.in_place and len(layer.live_subnets) == 1
            alike.setdefault((step, alone), []).append((parameter, layer))
        for (step, alone), members in alike.items():
            parameters, layers = zip(*members, strict=True)
            self._step_alike(parameters, layers if alone else (), int(step), group)
            if not alone:
                flush_all([layer for layer in layers if layer is not None])

    def _start(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give a parameter its state, all zero; small state is flat."""
        wanted = torch.bfloat16 if self.master == "residual" else torch.float32
        if parameter.dtype != wanted:
            raise ConfigError(
                f"SubnetAdamW(master={self.master!r}): expected {wanted} values, found "
                f"{parameter.dtype}; "
                'use SubnetConfig(values_dtype="bfloat16") with master="residual", else "fp32"'
            )
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        flat = parameter.detach().view(-1)
        for name, codes in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            if self.state_bits == 8:
                state[name] = torch.zeros_like(flat, dtype=codes)
                blocks = -(-flat.numel() // small_state.BLOCK)
                state[f"{name}_scale"] = torch.zeros(blocks, device=flat.device)
            else:
                like = parameter if self.master == "fp32" else flat
                state[name] = torch.zeros_like(like, dtype=torch.float32)
        if self.master == "residual":
            state["residual"] = torch.zeros_like(flat, dtype=torch.int8)
        return state

    def _step_alike(
        self,
        parameters: Sequence[torch.Tensor],
        layers: Sequence[SubnetLayer],
        step: int,
        group: dict[str, Any],
    ) -> None:
        """Step parameters and write the weights of their layers; without layers, write none."""
        impl = None if layers else "torch"  # no kernel steps what no weight holds
        states = [self.state[parameter] for parameter in parameters]
        columns = [
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        ]
        weights = [
            [layer.weight.data for layer in layers],
            [layer.live_subnets[0].indices for layer in layers],
        ]
        beta1, beta2 = group["betas"]
        numbers = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        numbers |= {"step": step, "beta1": beta1, "beta2": beta2}
        if self.state_bits == 32 and self.master == "fp32":
            ops.adamw_step_(*columns, *weights, **numbers, impl=impl)
        else:
            small = {
                f"{name}s": [state[name] for state in states]
                for name in ("exp_avg_scale", "exp_avg_sq_scale", "residual")
                if name in states[0]
            }
            flat = [[tensor.view(-1) for tensor in column] for column in columns]
            ops.adamw_small_step_(*flat, *weights, **small, **numbers, impl=impl)
        for layer in layers:
            layer.count_write()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; released ones cannot be zeroed in place."""
        super().zero_grad(set_to_none or self.release_gradients)

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
