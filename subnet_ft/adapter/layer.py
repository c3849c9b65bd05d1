"""SubnetLayer: the sidecar of one masked parameter, in the shape of a PEFT tuner layer."""

from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from subnet_ft.adapter.binding import Bind
from subnet_ft.adapter.gradients import pays
from subnet_ft.adapter.live import LiveWeight
from subnet_ft.adapter.subnet import Subnet
from subnet_ft.errors import MaskMismatchError, UnsupportedError

# Every sidecar alive, so that one optimizer hook can find whose values were stepped.
ALIVE: WeakSet["SubnetLayer"] = WeakSet()


class SubnetLayer(LiveWeight, BaseTunerLayer):
    """Trains one parameter of the base: binds its values for autograd, and follows PEFT's verbs.

    Args:
        name: The base parameter's name.
        owners: (module, leaf) of every place the parameter is used; tied weights have several.
    """

    adapter_layer_names = ("subnet_ft_values",)
    merged_adapters: list[str]
    _disable_adapters: bool

    def __init__(self, name: str, owners: Sequence[tuple[nn.Module, str]]) -> None:
        super().__init__(name, owners)
        self.merged_adapters = []
        self._active_adapter: str | list[str] = []
        ALIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        ALIVE.add(self)  # a deepcopy does not pass through __init__

    def get_base_layer(self) -> nn.Module:
        """Return the module that owns the parameter."""
        return self.owners[0][0]

    @property
    def in_features(self) -> int:
        """Last dimension of the parameter, as PEFT's tools expect of a tuner layer."""
        return self.shape[-1]

    @property
    def out_features(self) -> int:
        """First dimension of the parameter."""
        return self.shape[0]

    def bind(self, weight: torch.Tensor) -> torch.Tensor:
        """Attach the live values to ``weight`` for autograd; see `binding.Bind`."""
        self.check_weight(weight)
        if not self.learns:
            return weight
        return Bind.apply(weight, self, *(subnet.values for subnet in self.live_subnets))

    def check_weight(self, weight: torch.Tensor) -> None:
        """Refuse a weight other than the one the entries were made for.

        Raises:
            SubnetError: It is another one, or has another shape.
        """
        if weight is not self.weight:
            raise UnsupportedError(
                f"{self.name}: expected the weight it was tied to, found another one; "
                "tie or untie embeddings before attaching the adapter"
            )
        if tuple(weight.shape) != self.shape:
            raise MaskMismatchError(
                f"{self.name}: expected shape {self.shape}, found {tuple(weight.shape)}; "
                "resize embeddings before attaching the adapter"
            )

    @property
    def learns(self) -> bool:
        """Whether a live adapter's values take gradients."""
        return any(subnet.values.requires_grad for subnet in self.live_subnets)

    @property
    def computes_weight_grad(self) -> bool:
        """Whether the weight's gradient is computed at its entries alone; see `gradients`."""
        return self.learns and all(
            subnet.computes_weight_grad and not subnet.scout for subnet in self.live_subnets
        )

    def forget_norms(self) -> None:
        """Let go of the norms noted for ``clip="dense"``: a step comes after clipping."""
        for subnet in self.live_subnets:
            if subnet.offmask is not None:
                subnet.offmask.forget()

    def add(
        self,
        adapter: str,
        indices: torch.Tensor,
        originals: torch.Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        offmask: bool = False,
        weight_grad: str = "dense",
    ) -> None:
        """Give ``adapter`` entries of its own, starting at the base's values.

        Args:
            adapter: Name of the adapter; entries it already has are replaced.
            indices: (nnz,) int64, strictly increasing flat positions.
            originals: (nnz,) the base's values there, in the weight's dtype.
            dtype: Of the values.
            offmask: Serve ``clip="dense"``.
            weight_grad: As in `SubnetConfig`.
        """
        self._write(())
        leaf = "bias" if self.owners[0][1] == "bias" else "weight"
        self.subnet_ft_values[adapter] = Subnet(
            leaf,
            indices,
            originals,
            dtype,
            len(self.owners) if offmask else 0,
            weight_grad == "compact" or (weight_grad == "auto" and pays(self.shape)),
        )
        self.sync()

    def sync(self) -> None:
        """Make the weight hold the adapters that should be live now."""
        if self.disable_adapters:
            wanted: tuple[str, ...] = ()
        else:
            wanted = tuple(self.merged_adapters or cast(list[str], self.active_adapters))
        wanted = tuple(name for name in dict.fromkeys(wanted) if name in self.subnet_ft_values)
        self.hold(wanted)

    # PEFT's verbs, each followed by `sync`.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make the named adapters the active ones."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.sync()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the active adapters and the base's own values."""
        super().enable_adapters(enabled)
        self.sync()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, giving its entries back to the base first."""
        if adapter_name in self.live + self.deferred:
            self._write(())
        super().delete_adapter(adapter_name)
        self.sync()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep the named adapters in the weight until `unmerge`, whichever are active.

        Raises:
            ValueError: ``safe_merge`` found a value that is not finite.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        adapter_names = [name for name in adapter_names if name in self.subnet_ft_values]
        for name, subnet in zip(adapter_names, self.subnets(tuple(adapter_names)), strict=True):
            if safe_merge and not subnet.values.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        self.merged_adapters = self.merged_adapters + adapter_names
        self.sync()

    def unmerge(self) -> None:
        """End `merge`: the weight follows the active adapters again."""
        self.merged_adapters = []
        self.sync()

    def check_cast(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Refuse a conversion that would change the weight's dtype.

        Raises:
            UnsupportedError: It would.
        """
        weight = self.weight
        if fn(weight.data.new_empty(0)).dtype != weight.dtype:
            raise UnsupportedError(
                f"{self.name}: expected dtype {weight.dtype} to stay, found a cast; "
                "cast the base model before attaching the adapter"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.check_cast(fn)

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            # A cast to the weight's dtype is none for the model, but would round the values.
            like = fn(tensor.data.new_empty(0))
            return fn(tensor) if like.dtype == tensor.dtype else tensor.to(like.device)

        return super()._apply(keep_dtype, recurse)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's version would also cast the values to the weight's dtype.
        if subnet := self.subnet(adapter_name):
            subnet.to(device or self.weight.device)

    def extra_repr(self) -> str:
        """Show the parameter in a printed model."""
        return f"{self.name}, shape={self.shape}"
