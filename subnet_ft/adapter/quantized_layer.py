"""The sidecar of a quantized weight: the weight stays as it is, the values live beside it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from subnet_ft import ops
from subnet_ft.adapter.layer import SubnetLayer
from subnet_ft.adapter.linear import run
from subnet_ft.adapter.quantized import EIGHT_BIT, FOUR_BIT, dequantize, entries_dtype
from subnet_ft.adapter.quantized_linear import AddedDelta
from subnet_ft.adapter.subnet import Subnet
from subnet_ft.adapter.writing import compose, read_entries
from subnet_kernels.reference_weight_grad import CHUNK

Forward = Callable[[torch.Tensor], torch.Tensor]


class QuantizedLayer(SubnetLayer):
    """`SubnetLayer` of a weight that cannot be edited: the same verbs, but nothing is written.

    `sync` and `flush` note which adapters are live and that their values changed; `linear` runs the
    layer with them. Originals are the dequantized entries.
    """

    in_place = False

    def linear(self, owner: Any, own: Forward, inputs: torch.Tensor) -> torch.Tensor:
        """Run the layer with the live values.

        Args:
            owner: The layer.
            own: Its forward pass without them.
            inputs: (..., cols).
        """
        raise NotImplementedError

    def dense(self, dtype: torch.dtype, subnets: Sequence[Subnet] | None = None) -> torch.Tensor:
        """Return the weight as it would be, (rows, cols); a copy.

        Args:
            dtype: What it is dequantized to.
            subnets: Whose values it holds; by default the live adapters'.
        """
        weight = dequantize(self.owners[0][0], dtype)
        subnets = self.live_subnets if subnets is None else subnets
        if len(subnets) == 1:
            ops.scatter_(weight, subnets[0].indices, subnets[0].values.detach())
        elif subnets:
            indices, _, values = compose(subnets)
            ops.scatter_(weight, indices, values)
        return weight

    def add(
        self, adapter: str, indices: torch.Tensor, originals: torch.Tensor, **options: Any
    ) -> None:
        """Give ``adapter`` entries of its own; gradients are always computed at them alone."""
        super().add(adapter, indices, originals, **(options | {"weight_grad": "compact"}))

    def read_base(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the dequantized entries at ``indices``, in the dtype originals have."""
        return read_dequantized(self.owners[0][0], indices)

    def rewrite(self) -> None:
        """Note that values were loaded; there is nothing to write."""
        self.flush()

    def _write(self, adapters: tuple[str, ...]) -> None:
        self._note(adapters)


class FourBitLayer(QuantizedLayer):
    """Of NF4 and FP4: the layer computes on the dequantized weight with the values in it."""

    def linear(self, owner: Any, own: Forward, inputs: torch.Tensor) -> torch.Tensor:
        """Run the layer with the live values, in the dtype its own forward pass computes in."""
        if not owner.compute_type_is_set:
            owner.set_compute_type(inputs)
            owner.compute_type_is_set = True
        x = inputs if owner.compute_dtype is None else inputs.to(owner.compute_dtype)
        bias = None if owner.bias is None else owner.bias.to(x.dtype)
        return run(x, None, bias, self).to(inputs.dtype)


class EightBitLayer(QuantizedLayer):
    """Of LLM.int8: the layer's own product, and the product of the values' change added to it."""

    def __init__(self, name: str, owners: Sequence[tuple[nn.Module, str]]) -> None:
        super().__init__(name, owners)
        self.places: dict[str, list[int]] = {}

    def linear(self, owner: Any, own: Forward, inputs: torch.Tensor) -> torch.Tensor:
        """Run the layer, then add what the live values change."""
        output = own(inputs)
        x = inputs.reshape(-1, inputs.shape[-1]).to(output.dtype)
        values = [subnet.values for subnet in self.live_subnets]
        flat = output.reshape(-1, output.shape[-1])
        result: torch.Tensor = AddedDelta.apply(flat, x, self, *values)
        return result.view_as(output)

    def add(
        self, adapter: str, indices: torch.Tensor, originals: torch.Tensor, **options: Any
    ) -> None:
        """Give ``adapter`` entries of its own."""
        super().add(adapter, indices, originals, **options)
        rows, cols = self.shape
        starts = torch.arange(0, rows + self.height, self.height, device=indices.device) * cols
        # Where each block of rows begins among the entries; numbers, for `torch.compile` as well.
        self.places[adapter] = torch.searchsorted(indices, starts).tolist()

    @property
    def height(self) -> int:
        """How many rows of the change there are at a time."""
        rows, cols = self.shape
        return min(rows, max(1, CHUNK // cols))

    def delta(
        self, dtype: torch.dtype, adapters: Sequence[str]
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Give what the values change, some rows at a time, rows without an entry never.

        Dense rows: torch's sparse product has no bf16 on a CPU, where a dense one in bf16 takes
        less time than a sparse one in fp32.

        Args:
            dtype: Of the change; several adapters' are summed in fp32 before.
            adapters: Whose values.

        Yields:
            Rows, and (rows, cols) of values - dequantized there, 0 outside the mask.
        """
        rows, cols = self.shape
        summed = dtype if len(adapters) == 1 else torch.float32
        for block, row in enumerate(range(0, rows, self.height)):
            parts = {name: slice(*self.places[name][block : block + 2]) for name in adapters}
            if all(part.start == part.stop for part in parts.values()):
                continue
            stop = min(row + self.height, rows)
            change = torch.zeros((stop - row) * cols, dtype=summed, device=self.weight.device)
            for subnet, part in zip(self.subnets(tuple(adapters)), parts.values(), strict=True):
                entries = subnet.values.detach()[part].float() - subnet.originals[part]
                change.index_add_(0, subnet.indices[part] - row * cols, entries.to(summed))
            yield slice(row, stop), change.view(-1, cols).to(dtype)


CLASSES: dict[str | None, type[SubnetLayer]] = {
    None: SubnetLayer,
    FOUR_BIT: FourBitLayer,
    EIGHT_BIT: EightBitLayer,
}


def read_dequantized(module: Any, indices: torch.Tensor) -> torch.Tensor:
    """Return a quantized weight's entries, (nnz,) in `quantized.entries_dtype`.

    Args:
        module: The linear layer.
        indices: (nnz,) int64.
    """
    return read_entries(dequantize(module, entries_dtype(module)), indices)
