"""LiveWeight: a masked parameter, which adapters' values lie in it, and how they get there."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from subnet_ft import ops
from subnet_ft.adapter.binding import original_class
from subnet_ft.adapter.linear import is_linear, product_dtype
from subnet_ft.adapter.quantized import weight_shape
from subnet_ft.adapter.subnet import Subnet
from subnet_ft.adapter.writing import compose, flush_all, read_entries
from subnet_ft.errors import StaleGraphError

Mark = tuple[tuple[str, ...], int | None]  # which adapters are live, how often they were written


class LiveWeight(nn.Module):
    """Keeps one parameter of the base equal to its live adapters, entry by entry, in place.

    Args:
        name: The base parameter's name.
        owners: (module, leaf) of every place the parameter is used; tied weights have several.

    The weight always holds the originals plus what is live: `hold` makes it so after a change of
    adapters, `flush` after a change of values. Both write ``weight.data``, at masked entries only.
    A graph relies on `live`, which adapters those are, and on `written`, how often `flush` ran.

    One write waits until somebody looks: when a linear layer's adapters go off, its weight keeps
    their values (`deferred`), and the next forward pass takes the base's from a copy (`base_once`).
    A reference model's pass, one with adapters off and then back on, thus writes nothing. Reading
    the weight through its module or here writes the originals first (`settle`).
    """

    in_place = True  # the weight holds what is live; of a quantized one, it cannot
    subnet_ft_values: nn.ModuleDict
    owners: tuple[tuple[nn.Module, str], ...]
    live: tuple[str, ...]
    written: int
    live_subnets: list[Subnet]  # those of `live`, at hand for every optimizer step
    deferred: tuple[str, ...]  # whose values the weight holds though nothing is live
    copied: bool  # a forward pass took the base from a copy since

    def __init__(self, name: str, owners: Sequence[tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.name = name
        # In a plain tuple: the owner is our parent, and must not become our child.
        self.__dict__["owners"] = tuple(owners)
        self.shape = weight_shape(*self.owners[0])
        self.subnet_ft_values = nn.ModuleDict()
        self.live, self.written = (), 0
        self.live_subnets = []
        self.deferred, self.copied = (), False
        self.register_load_state_dict_post_hook(_rewrite_after_load)

    @property
    def weight(self) -> nn.Parameter:
        """The base parameter itself, never bound; it holds what is live."""
        self.settle()
        return self._stored

    def subnets(self, adapters: tuple[str, ...] | None = None) -> list[Subnet]:
        """Return the entries of the named adapters, by default of those live now."""
        names = self.live if adapters is None else adapters
        return [cast(Subnet, self.subnet_ft_values[name]) for name in names]

    def subnet(self, adapter: str) -> Subnet | None:
        """Return an adapter's entries, None where it has none here."""
        found = self.subnet_ft_values[adapter] if adapter in self.subnet_ft_values else None
        return cast(Subnet | None, found)

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

    def hold(self, adapters: tuple[str, ...]) -> None:
        """Make the weight hold these adapters' values, or note that it will."""
        if adapters == self.live:
            return
        if adapters and adapters == self.deferred:
            self._note(adapters)
        elif not adapters and self._can_defer:
            self._note((), deferred=self.live)
        else:
            self._write(adapters)

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


def _rewrite_after_load(weight: LiveWeight, incompatible_keys: Any) -> None:
    weight.rewrite()
