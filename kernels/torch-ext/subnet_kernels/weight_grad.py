"""weight_grad: a linear layer's weight gradient at the kept entries, never the dense one."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._jit import add
from ._launch import FLOATS, INDICES, Column, check, on_device
from ._tune import is_interpreted, milliseconds
from .encoding import TILE_COLS, Tiles, encode_tiles


class TileConfig(NamedTuple):
    """Rows of a tile, tokens multiplied at a time, warps and stages of a program."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


# A tile's columns are fixed by its encoding. Two tile heights, deep and shallow steps.
SEARCH = (TileConfig(64, 32, 4, 3), TileConfig(64, 64, 8, 2), TileConfig(128, 32, 8, 2))
INTERPRETED = TileConfig(16, 16, 4, 1)


@triton.jit
def _weight_grad_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Compute ``out[place(r, c)] (+)= sum_t dy[t, r] * x[t, c]`` at every kept (r, c), in fp32.

    Grid: (ceil(rows / ROWS), ceil(cols / COLS)), a program a tile of the weight; one that keeps
    nothing of its tile returns at once. Flops: 2 * tokens * ROWS * COLS a tile. Bytes a tile:
    tokens * (ROWS + COLS) elements of dy and x, through the cache; 1 bit and 8 / COLS bytes of
    encoding an element; 4 written an entry, + 4 read when accumulating.
    Twin: ``reference_weight_grad.weight_grad``.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    row_inside, col_inside = r < rows, c < cols
    slot = r.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = tl.load(offsets_ptr + slot, mask=row_inside, other=0)
    last = tl.load(offsets_ptr + slot + 1, mask=row_inside, other=0)
    if tl.reduce(last - first, 0, add) > 0:
        total = tl.full((ROWS, COLS), 0.0, dtype=tl.float32)
        for start in range(0, tokens, TOKENS):
            t = start + tl.arange(0, TOKENS)
            t_inside, t_wide = t < tokens, t.to(tl.int64)
            dy = tl.load(
                dy_ptr + t_wide[:, None] * rows + r[None, :],
                mask=t_inside[:, None] & row_inside[None, :],
                other=0.0,
            )
            x = tl.load(
                x_ptr + t_wide[:, None] * cols + c[None, :],
                mask=t_inside[:, None] & col_inside[None, :],
                other=0.0,
            )
            if WIDEN:  # the interpreter multiplies the bits of bf16
                dy, x = dy.to(tl.float32), x.to(tl.float32)
            total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
        flat = r.to(tl.int64)[:, None] * cols + c[None, :]
        inside = row_inside[:, None] & col_inside[None, :]
        byte = tl.load(bits_ptr + (flat >> 3), mask=inside, other=0).to(tl.int32)
        bit = (byte >> (flat & 7).to(tl.int32)) & 1
        place = first[:, None] + tl.associative_scan(bit, 1, add) - bit
        if ACCUMULATE:
            total += tl.load(out_ptr + place, mask=bit != 0, other=0.0)
        tl.store(out_ptr + place, total, mask=bit != 0)


def weight_grad(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """Compute ``out[i] (+)= sum_t dy[t, r_i] * x[t, c_i]``, where entry i is at (r_i, c_i).

    Args:
        dy: (tokens, rows) float32|bfloat16|float16, contiguous.
        x: (tokens, cols), same dtype, contiguous.
        indices: (nnz,) int32|int64, flat positions in the (rows, cols) weight, strictly increasing.
        out: (nnz,) float32; allocated when absent.
        accumulate: Add to ``out`` instead of overwriting it.
        tiles: The same entries by `encoding.encode_tiles`; None encodes them anew.

    Returns:
        ``out``.

    Raises:
        ValueError: a dtype, size, stride or device is not as above.
    """
    if out is None:
        out = torch.zeros(indices.numel(), dtype=torch.float32, device=dy.device)
    if dy.ndim != 2 or x.ndim != 2 or len(dy) != len(x):
        raise ValueError(
            f"expected dy (tokens, rows) and x (tokens, cols), got {tuple(dy.shape)} and "
            f"{tuple(x.shape)}."
        )
    rows, cols = dy.shape[1], x.shape[1]
    check(
        [
            Column("dy", [dy], [*FLOATS]),
            Column("x", [x], [dy.dtype]),
            Column("indices", [indices], [*INDICES]),
            Column("out", [out], [torch.float32], [indices.numel()]),
        ]
    )
    if not is_interpreted(_weight_grad_kernel) and dy.device.type == "cpu":
        raise ValueError("expected tensors on a GPU, got cpu; subnet_kernels.twins runs there.")
    if not indices.numel():
        return out
    bits, offsets = tiles or encode_tiles(indices, rows, cols)

    def run(result: Tensor, add_to: bool, config: TileConfig) -> None:
        grid = (triton.cdiv(rows, config.rows), triton.cdiv(cols, TILE_COLS))
        with on_device(dy.device):
            _weight_grad_kernel[grid](
                dy,
                x,
                bits,
                offsets,
                result,
                len(dy),
                rows,
                cols,
                ACCUMULATE=add_to,
                ROWS=config.rows,
                COLS=TILE_COLS,
                TOKENS=config.tokens,
                WIDEN=is_interpreted(_weight_grad_kernel),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )

    if is_interpreted(_weight_grad_kernel):
        config = INTERPRETED
    else:
        scratch = torch.empty_like(out)
        config = _best(dy.device, dy.dtype)(lambda c: milliseconds(lambda: run(scratch, False, c)))
    run(out, accumulate, config)
    return out


@cache
def _best(
    device: torch.device, dtype: torch.dtype
) -> Callable[[Callable[[TileConfig], float]], TileConfig]:
    """Remember the fastest configuration for a device and dtype, timed on the first operands."""
    found: list[TileConfig] = []

    def choose(cost: Callable[[TileConfig], float]) -> TileConfig:
        if not found:
            found.append(min(SEARCH, key=cost))
        return found[0]

    return choose
