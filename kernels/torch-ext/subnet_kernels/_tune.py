"""Block sizes: fixed when interpreted, on a device the fastest of four, timed once on scratch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Config(NamedTuple):
    """Entries and warps of a program."""

    block: int
    num_warps: int


# Every kernel here is bound by scattered memory accesses: what matters is how many of them are in
# flight. 4 or 8 entries a thread; at 16 AdamW takes every register that a thread can have.
SEARCH = (Config(512, 4), Config(1024, 4), Config(1024, 8), Config(2048, 8))
INTERPRETED = Config(256, 4)  # little overhead, yet several programs for a small tensor
# What a search is timed on: scattered over 8 times as many dense elements, 80 MiB for AdamW.
SCRATCH_ENTRIES, SCRATCH_SPREAD = 1 << 19, 8

_best: dict[tuple[Any, ...], Config] = {}


def is_interpreted(kernel: object) -> bool:
    """Tell whether TRITON_INTERPRET=1 was set when the kernel was defined."""
    return not isinstance(kernel, triton.JITFunction)


def best_config(
    kernel: Any,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    run: Callable[[list[Tensor], int, Config], Callable[[], None]],
    search: Sequence[Config] = SEARCH,
) -> Config:
    """Choose the block size of a kernel for a device and dtypes.

    On scratch, because a search repeats the kernel and most of them change their operands.

    Args:
        kernel: the jitted function.
        device: where it runs.
        dtypes: of each of its columns; int32 and int64 are indices.
        run: given a tensor a column, the number of entries and a configuration, returns what to
            time.
        search: what to choose from.
    """
    if is_interpreted(kernel):
        return INTERPRETED
    key = (kernel, device, dtypes)
    if key not in _best:
        columns = [_scratch(dtype, device) for dtype in dtypes]
        _best[key] = min(search, key=lambda c: milliseconds(run(columns, SCRATCH_ENTRIES, c)))
    return _best[key]


def milliseconds(run: Callable[[], None]) -> float:
    """Return the median time of a call on the device."""
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


def _scratch(dtype: torch.dtype, device: torch.device) -> Tensor:
    size = SCRATCH_ENTRIES * SCRATCH_SPREAD
    if dtype not in (torch.int32, torch.int64):
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.arange(0, size, SCRATCH_SPREAD, dtype=dtype, device=device)
