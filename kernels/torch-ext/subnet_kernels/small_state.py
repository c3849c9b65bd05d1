"""Small optimizer state, in torch: 8-bit moments, bf16 values with 8 bits more.

Moments are quantized in blocks of ``BLOCK`` entries with one fp32 scale, the block's largest
magnitude, after companding: a square root for ``exp_avg``, a fourth root for ``exp_avg_sq``. The
code of a positive ``exp_avg_sq`` is never 0, so that no denominator vanishes.

A residual keeps what rounding a value to bf16 loses: value and residual together are the first 24
bits of the fp32 number.
"""

import torch

BLOCK = 256


def quantize_exp_avg(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the average of gradients to 8 bits, to nearest.

    Args:
        x: (nnz,) float32.

    Returns:
        codes: (nnz,) int8. scales: (ceil(nnz / BLOCK),) float32.
    """
    unit, scales = _normalized(x)
    codes = unit.abs().sqrt_().copysign_(unit).mul_(127).round_().to(torch.int8)
    return codes.reshape(-1)[: x.numel()], scales


def quantize_exp_avg_sq(x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the average of squared gradients to 8 bits, so that no drift is lost.

    A step moves it by 1 - beta2, far less than half a code: rounded to nearest it would follow
    only what grows fast. (In 300 steps of a real run denominators came out 6% too small and paths
    6% too long.) So what is added before the cut alternates, see `dither`; entry i of a block is i
    steps ahead, lest all of them round up at once.

    Args:
        x: (nnz,) float32, not negative.
        step: how many steps with this one.

    Returns:
        codes: (nnz,) uint8. scales: (ceil(nnz / BLOCK),) float32.
    """
    unit, scales = _normalized(x)
    least = unit.sign()  # 1 where positive
    ahead = torch.tensor([(dither(step + i) + 0.5) / 256 for i in range(BLOCK)], device=x.device)
    codes = unit.sqrt_().sqrt_().mul_(255).add_(ahead).floor_().maximum(least).to(torch.uint8)
    return codes.reshape(-1)[: x.numel()], scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Invert either: (nnz,) float32."""
    unit = _blocks(codes.float())
    if codes.dtype == torch.int8:
        unit = unit.mul_(1 / 127)
        unit = unit * unit.abs()
    else:
        unit = unit.mul_(1 / 255).square_().square_()
    return unit.mul_(scales[:, None]).reshape(-1)[: codes.numel()]


def dither(step: int) -> int:
    """Return what rounding adds at a step, before it cuts: 0 to 255, each once in 256 steps.

    In golden-ratio order, so that any few steps in a row come close to an even spread.
    """
    return 159 * step % 256


def split(x: torch.Tensor, dither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 values into bf16 values and the next 8 bits of the mantissa.

    Rounding to nearest would lose every update of less than half a code, at each step anew. With
    another `dither` at every step the cut goes up as often as it should: nothing is lost on
    average, and what fits stays as it is.

    Args:
        x: (nnz,) float32.
        dither: 0 to 255; 128 rounds to nearest.

    Returns:
        values: (nnz,) bfloat16, to which what `join` gives rounds, midpoints away from zero.
        residual: (nnz,) int8.
    """
    bits = x.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf).view(torch.int32)
    bits = bits.add(dither).bitwise_right_shift_(8)  # sign and magnitude: away from zero
    values = (bits + 0x80).bitwise_right_shift_(8)
    residual = bits.sub_(values << 8).to(torch.int8)
    return values.to(torch.int16).view(torch.bfloat16), residual


def join(values: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Invert `split`, to within 1/256 of a bf16 step; 1/512 where it rounded to nearest.

    Args:
        values: (nnz,) bfloat16.
        residual: (nnz,) int8.

    Returns:
        (nnz,) float32.
    """
    bits = values.view(torch.int16).int().bitwise_left_shift_(8).add_(residual)
    return bits.bitwise_left_shift_(8).view(torch.float32)


def _normalized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks (blocks, BLOCK) as shares of their largest magnitude, and those (blocks,)."""
    blocks = _blocks(x)
    scales = blocks.abs().amax(dim=1)
    return blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], scales


def _blocks(x: torch.Tensor) -> torch.Tensor:
    rest = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, rest)) if rest else x).view(-1, BLOCK)
