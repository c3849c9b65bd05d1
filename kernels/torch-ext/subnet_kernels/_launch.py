"""One launch for many tensors: their checks and the table of pointers a kernel reads."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tune import SEARCH, Config, best_config, is_interpreted

FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INDICES = {torch.int32: tl.int32, torch.int64: tl.int64}
TYPES = {**FLOATS, **INDICES, torch.uint8: tl.uint8, torch.int8: tl.int8}


class Column(NamedTuple):
    """One operand of a kernel, a tensor for each tensor launched.

    `sizes` gives the entries each must have; None takes any.
    """

    name: str
    tensors: Sequence[Tensor]
    dtypes: Sequence[torch.dtype]
    sizes: Sequence[int] | None = None


class Group(NamedTuple):
    """What one launch needs: the tensors that share a device and the dtype of every column.

    `table` is (tensors, columns + 2) int64: the address of each column, the number of entries, the
    tensor's first program. `tensor_of` is (programs,) int32: the tensor of each program.
    """

    dtypes: tuple[torch.dtype, ...]
    table: Tensor
    tensor_of: Tensor
    config: Config


class LaunchTable:
    """Pointers on the device, kept between calls and uploaded again only when one of them moved.

    Give each call site one of its own. It holds addresses, not tensors: it keeps nothing alive.
    """

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.groups: list[Group] = []


def launch(
    kernel: Any,
    columns: Sequence[Column],
    lengths: Sequence[int],
    table: LaunchTable | None,
    *arguments: Any,
    config: Config | None = None,
    search: Sequence[Config] = SEARCH,
    **constants: Any,
) -> None:
    """Run a kernel over many tensors, once for each device and combination of dtypes.

    Args:
        kernel: takes a table and a map as of `Group`, `arguments`, a dtype for each column, and by
            name BLOCK and `constants`.
        columns: its operands.
        lengths: entries to work on, per tensor; one without any gets no program.
        table: keeps the pointers between calls.
        arguments: passed on.
        config: sizes of a program; None has them chosen.
        search: what to choose them from.
        constants: passed on.

    Raises:
        ValueError: see `check`; or a tensor on the CPU, unless interpreted.
    """
    table = table or LaunchTable()
    key = tuple(
        [
            (t.data_ptr(), t.numel(), t.is_contiguous(), t.dtype, t.device)
            for column in columns
            for t in column.tensors
        ]
    )
    if table.key != key:
        check(columns)
        if not is_interpreted(kernel) and any(t.device.type == "cpu" for t in columns[0].tensors):
            raise ValueError("expected tensors on a GPU, got cpu; subnet_kernels.twins runs there.")
        rows: dict[tuple[Any, ...], list[int]] = {}
        for row, tensors in enumerate(zip(*(c.tensors for c in columns), strict=True)):
            if lengths[row]:
                dtypes = tuple(tensor.dtype for tensor in tensors)
                rows.setdefault((tensors[0].device, dtypes), []).append(row)

        def timed(scratch: list[Tensor], length: int, config: Config) -> Callable[[], None]:
            group = make_group([scratch], [length], config)
            return lambda: run_group(kernel, group, *arguments, **constants)

        table.groups = [
            make_group(
                [[column.tensors[row] for column in columns] for row in members],
                [lengths[row] for row in members],
                config or best_config(kernel, device, dtypes, timed, search),
            )
            for (device, dtypes), members in rows.items()
        ]
        table.key = key
    for group in table.groups:
        run_group(kernel, group, *arguments, **constants)


def make_group(rows: Sequence[Sequence[Tensor]], lengths: Sequence[int], config: Config) -> Group:
    """Upload the table of tensors that share a device and dtypes.

    Args:
        rows: per tensor launched, one tensor a column.
        lengths: entries to work on, per row.
        config: sizes of a program.
    """
    device = rows[0][0].device
    programs = [triton.cdiv(length, config.block) for length in lengths]
    table, first = [], 0
    for tensors, length, count in zip(rows, lengths, programs, strict=True):
        table.append([*(tensor.data_ptr() for tensor in tensors), length, first])
        first += count
    # Without waiting for the device: a copy from pageable memory is staged before the call returns.
    counts = torch.tensor(programs).to(device, non_blocking=True)
    tensor_of = torch.arange(len(rows), dtype=torch.int32, device=device)
    return Group(
        tuple(tensor.dtype for tensor in rows[0]),
        torch.tensor(table).to(device, non_blocking=True),
        tensor_of.repeat_interleave(counts, output_size=first),
        config,
    )


def run_group(kernel: Any, group: Group, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel over a group, on the group's device."""
    with on_device(group.table.device):
        kernel[(group.tensor_of.numel(),)](
            group.table,
            group.tensor_of,
            *arguments,
            *(TYPES[dtype] for dtype in group.dtypes),
            BLOCK=group.config.block,
            num_warps=group.config.num_warps,
            **constants,
        )


def on_device(device: torch.device) -> Any:
    """Make a device the current one; the CPU, where kernels run interpreted, needs nothing."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def check(columns: Sequence[Column]) -> None:
    """Refuse what a kernel would read wrongly.

    Raises:
        ValueError: columns of different lengths, a row on several devices, or a tensor that has
            another dtype or size than its column says, or is not contiguous.
    """
    if len({len(column.tensors) for column in columns}) != 1:
        counts = ", ".join(f"{len(column.tensors)} of {column.name}" for column in columns)
        raise ValueError(f"expected as many tensors in every list, got {counts}.")
    for row in range(len(columns[0].tensors)):
        devices = {column.name: str(column.tensors[row].device) for column in columns}
        if len(set(devices.values())) != 1:
            raise ValueError(f"tensor {row}: expected one device, got {devices}.")
        for column in columns:
            tensor, where = column.tensors[row], f"{column.name} of tensor {row}"
            if tensor.dtype not in column.dtypes:
                expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in column.dtypes)
                raise ValueError(f"{where}: expected dtype {expected}, got {tensor.dtype}.")
            if column.sizes is not None and tensor.numel() != column.sizes[row]:
                expected = str(column.sizes[row])
                raise ValueError(f"{where}: expected {expected} entries, got {tensor.numel()}.")
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{where}: expected it contiguous, got shape {tuple(tensor.shape)} with "
                    f"stride {tensor.stride()}; call .contiguous() first."
                )
