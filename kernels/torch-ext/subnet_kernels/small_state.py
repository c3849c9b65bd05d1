"""Small optimizer state, in torch: 8-bit moments, bf16 values with 8 bits more.

Moments are quantized in blocks of ``BLOCK`` entries with one fp32 scale, the block's largest
magnitude, after companding: a square root for ``exp_avg``, a fourth root for ``exp_avg_sq``. The
code of a positive ``exp_avg_sq`` is never 0, so that no denominator vanishes.

A residual keeps what rounding a value to bf16 loses: value and residual together are the first 24
bits of the fp32 number.
"""

import torch

BLOCK = 256


def quantize(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a moment to 8 bits.

    Args:
        x: (nnz,) float32; not negative unless ``signed``.
        signed: ``exp_avg`` (True) or ``exp_avg_sq`` (False).

    Returns:
        codes: (nnz,) int8 when signed, else uint8. scales: (ceil(nnz / BLOCK),) float32.
    """
    blocks = _blocks(x)
    scales = blocks.abs().amax(dim=1)
    unit = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if signed:
        codes = unit.abs().sqrt_().copysign_(unit).mul_(127).round_().to(torch.int8)
    else:
        least = blocks.sign()  # 1 where positive
        codes = unit.sqrt_().sqrt_().mul_(255).round_().maximum(least).to(torch.uint8)
    return codes.reshape(-1)[: x.numel()], scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Invert `quantize`: (nnz,) float32."""
    unit = _blocks(codes.float())
    if codes.dtype == torch.int8:
        unit = unit.mul_(1 / 127)
        unit = unit * unit.abs()
    else:
        unit = unit.mul_(1 / 255).square_().square_()
    return unit.mul_(scales[:, None]).reshape(-1)[: codes.numel()]


def dither(step: int) -> int:
    """Return what `split` adds at a step, before it cuts: 0 to 255, each once in 256 steps.

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


def _blocks(x: torch.Tensor) -> torch.Tensor:
    rest = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, rest)) if rest else x).view(-1, BLOCK)
