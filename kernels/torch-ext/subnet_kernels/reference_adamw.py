"""Torch twins of compact AdamW with small state: 8-bit moments, bf16 values with a residual.

Moments are quantized in blocks of ``BLOCK`` entries with one fp32 scale, the block's largest
magnitude, after companding: a square root for ``exp_avg``, a fourth root for ``exp_avg_sq``. The
code of a positive ``exp_avg_sq`` is never 0, so that no denominator vanishes.

A residual keeps what rounding a value to bf16 loses: the error as a signed byte, in 1/254 of the
distance to the next bf16 value.
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


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 values into bf16 values and residuals.

    Args:
        x: (nnz,) float32, finite.

    Returns:
        values: (nnz,) bfloat16, nearest even. residual: (nnz,) int8.
    """
    values = x.to(torch.bfloat16)
    codes = (x - values).div_(_outward_half_step(values)).mul_(127).round_().clamp_(-127, 127)
    # From a power of two the next value inward is half as far: -63 stays short of the midpoint.
    bits = values.view(torch.int16)
    closer = (bits & 0x7F == 0).logical_and_(bits & 0x7F00 != 0)
    codes = codes.to(torch.int8)
    return values, torch.where(closer, codes.clamp(min=-63), codes)


def join(values: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Invert `split`, to within 1/400 of a bf16 step (1/200 at a power of two).

    Args:
        values: (nnz,) bfloat16.
        residual: (nnz,) int8.

    Returns:
        (nnz,) float32; rounds to ``values`` again.
    """
    return _outward_half_step(values).mul_(residual).mul_(_INSIDE / 127).add_(values)


# A reconstruction must not reach the midpoint between two bf16 values, where it might round away.
_INSIDE = 1 - 2.0**-10


def _outward_half_step(values: torch.Tensor) -> torch.Tensor:
    """Half the way from each bf16 value to the next one away from zero, float32, signed."""
    bits = values.view(torch.int16)
    power = (bits & 0x7F80).clamp_(min=0x80).bitwise_or_(bits & -0x8000)  # subnormals step as 0x80
    return power.view(torch.bfloat16).float().mul_(2.0**-8)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    rest = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, rest)) if rest else x).view(-1, BLOCK)
