"""SubnetLayer: the sidecar of one masked parameter, in the shape of a PEFT tuner layer."""

from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from subnet_ft import ops
from subnet_ft.adapter.binding import Bind, original_class
from subnet_ft.adapter.gradients import pays
from subnet_ft.adapter.linear import is_linear, product_dtype
from subnet_ft.adapter.quantized import weight_shape
from subnet_ft.adapter.subnet import Subnet
from subnet_ft.adapter.writing import compose, flush_all, read_entries
from subnet_ft.errors import MaskMismatchError, StaleGraphError, UnsupportedError

# Every sidecar alive, so that one optimizer hook can find whose values were stepped.
ALIVE: WeakSet["SubnetLayer"] = WeakSet()

Mark = tuple[tuple[str, ...], int | None]  # which adapters are live, how often they were written


class SubnetLayer(nn.Module, BaseTunerLayer):
    """Keeps one parameter of the base equal to its active adapter, entry by entry, in place.

    Args:
        name: The base parameter's name.
        owners: (module, leaf) of every place the parameter is used; tied weights have several.

    The weight always holds the originals plus what is live: `sync` makes it so after a change of
    adapters, `flush` after a change of values. Both write ``weight.data``, at masked entries only.
    A graph relies on `live`, which adapters those are, and on `written`, how often `flush` ran.

    One write waits until somebody looks: when a linear layer's adapters go off, its weight keeps
    their values (`deferred`), and the next forward pass takes the base's from a copy (`base_once`).
    A reference model's pass, one with adapters off and then back on, thus writes nothing. Reading
    the weight through its module or here writes the originals first (`settle`).
    """

    adapter_layer_names = ("subnet_ft_values",)
    in_place = True  # the weight holds what is live; of a quantized one, it cannot
    subnet_ft_values: nn.ModuleDict
    owners: tuple[tuple[nn.Module, str], ...]
    merged_adapters: list[str]
    live: tuple[str, ...]
    written: int
    live_subnets: list[Subnet]  # those of `live`, at hand for every optimizer step
    deferred: tuple[str, ...]  # whose values the weight holds though nothing is live
    copied: bool  # a forward pass took the base from a copy since
    _disable_adapters: bool

    def __init__(self, name: str, owners: Sequence[tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.name = name
        # In a plain tuple: the owner is our parent, and must not become our child.
        self.__dict__["owners"] = tuple(owners)
        self.shape = weight_shape(*self.owners[0])
        self.subnet_ft_values = nn.ModuleDict()
        self.merged_adapters = []
        self._active_adapter: str | list[str] = []
        self.live, self.written = (), 0
        self.live_subnets = []
        self.deferred, self.copied = (), False
        self.register_load_state_dict_post_hook(_rewrite_after_load)
        ALIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        ALIVE.add(self)  # a deepcopy does not pass through __init__

    def get_base_layer(self) -> nn.Module:
        """Return the module that owns the parameter."""
        return self.owners[0][0]

    @property
    def weight(self) -> nn.Parameter:
        """The base parameter itself, never bound; it holds what is live."""
        self.settle()
        return self._stored

    @property
    def in_features(self) -> int:
        """Last dimension of the parameter, as PEFT's tools expect of a tuner layer."""
        return self.shape[-1]

    @property
    def out_features(self) -> int:
        """First dimension of the parameter."""
        return self.shape[0]

    def subnets(self, adapters: tuple[str, ...] | None = None) -> list[Subnet]:
        """Return the entries of the named adapters, by default of those live now."""
        names = self.live if adapters is None else adapters
        return [cast(Subnet, self.subnet_ft_values[name]) for name in names]

    def subnet(self, adapter: str) -> Subnet | None:
        """Return an adapter's entries, None where it has none here."""
        found = self.subnet_ft_values[adapter] if adapter in self.subnet_ft_values else None
        return cast(Subnet | None, found)

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

    def mark(self) -> Mark:
        """Note at the forward pass what a graph relies on."""
        # A compiled graph would be compiled anew for every count: there the check is left out.
        return self.live, None if torch.compiler.is_compiling() else self.written

    def recall(self, mark: Mark) -> list[Subnet]:
        """Return at the backward pass the entries that were live at the forward pass.

        Raises:
            StaleGraphError: Adapters were switched or values written in between.
        """
        live, written = mark
        if written is not None and (live, written) != (self.live, self.written):
            raise StaleGraphError(
                f"{self.name}: the forward pass used adapters {list(live)} (write {written}), "
                f"backward finds {list(self.live)} (write {self.written}); run backward before "
                "switching adapters or stepping, or switch back"
            )
        return self.subnets(live)

    def read_base(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the base's own values at ``indices``, whatever is live.

        Args:
            indices: (nnz,) int64 on the weight's device.

        Returns:
            (nnz,) in the weight's dtype.
        """
        live = self.live
        self._write(())
        entries = read_entries(self.weight.data, indices)
        self._write(live)
        return entries

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
        if wanted == self.live:
            return
        if wanted and wanted == self.deferred:
            self._note(wanted)
        elif not wanted and self._can_defer:
            self._note((), deferred=self.live)
        else:
            self._write(wanted)

    def settle(self) -> None:
        """Write what was deferred: the originals, as nothing is live."""
        if self.deferred:
            self._write(())

    def base_once(self) -> torch.Tensor:
        """Return the base's weight for a forward pass without gradients, while values lie in it.

        Returns:
            (rows, cols). For the first pass a copy, in the dtype it computes in, which autocast
            would have made as well; from the second on, as in generating, the weight, settled.
        """
        if self.copied:
            return self.weight
        if not torch.compiler.is_compiling():  # a compiled graph goes on with copies
            self.__dict__["copied"] = True
        weight = self._stored.data
        copy = weight.to(product_dtype(weight), copy=True)
        for subnet in self.subnets(self.deferred):
            ops.scatter_(copy, subnet.indices, subnet.originals)
        return copy

    def flush(self) -> None:
        """Write the live values into the weight again, after they were changed.

        The optimizer hook and loading do this by themselves; call it after writing values by hand.
        """
        flush_all([self])

    def forget_norms(self) -> None:
        """Let go of the norms noted for ``clip="dense"``: a step comes after clipping."""
        for subnet in self.live_subnets:
            if subnet.offmask is not None:
                subnet.offmask.forget()

    def count_write(self) -> None:
        """Note that the live values were written: a graph from before must not be used."""
        self.__dict__["written"] += 1  # nn.Module's own way in takes 5 us

    def rewrite(self) -> None:
        """Make the weight hold what is live, whatever was written into it.

        A loaded weight holds what was live when it was saved, which need not be live now.
        """
        for subnet in self.subnets(tuple(self.subnet_ft_values)):
            ops.scatter_(self.weight.data, subnet.indices, subnet.originals)
        self.flush()

    @property
    def _stored(self) -> nn.Parameter:
        owner, leaf = self.owners[0]
        return cast(nn.Parameter, owner.__dict__["_parameters"][leaf])

    @property
    def _can_defer(self) -> bool:
        return self.in_place and all(
            leaf == "weight" and is_linear(original_class(owner)) for owner, leaf in self.owners
        )

    def _note(self, live: tuple[str, ...], deferred: tuple[str, ...] = ()) -> None:
        subnets = self.subnets(live)  # nn.Module's own way in takes 5 us an attribute
        self.__dict__.update(live=live, live_subnets=subnets, deferred=deferred, copied=False)

    def _write(self, adapters: tuple[str, ...]) -> None:
        if self.deferred:
            self._note(self.deferred)
        weight = self._stored.data
        if adapters != self.live or len(adapters) > 1:
            for subnet in self.live_subnets:
                ops.scatter_(weight, subnet.indices, subnet.originals)
        self._note(adapters)
        subnets = self.live_subnets
        if len(subnets) == 1:
            ops.scatter_(weight, subnets[0].indices, subnets[0].values.detach())
        elif subnets:
            indices, _, values = compose(subnets)
            ops.scatter_(weight, indices, values)

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


def _rewrite_after_load(layer: SubnetLayer, incompatible_keys: Any) -> None:
    layer.rewrite()
