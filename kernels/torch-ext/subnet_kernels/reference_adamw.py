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
        codes = (unit.abs().sqrt() * unit.sign() * 127).round().to(torch.int8)
    else:
        codes = (unit.sqrt().sqrt() * 255).round()
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes).to(torch.uint8)
    return codes.reshape(-1)[: x.numel()].clone(), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Invert `quantize`: (nnz,) float32."""
    blocks = _blocks(codes.float())
    if codes.dtype == torch.int8:
        unit = blocks / 127
        unit = unit * unit.abs()
    else:
        unit = (blocks / 255).square().square()
    return (unit * scales[:, None]).reshape(-1)[: codes.numel()]


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 values into bf16 values and residuals.

    Args:
        x: (nnz,) float32, finite.

    Returns:
        values: (nnz,) bfloat16, nearest even. residual: (nnz,) int8.
    """
    values = x.to(torch.bfloat16)
    outward = _outward_half_step(values)
    codes = ((x - values.float()) / outward * 127).round()
    # From a power of two the next value inward is half as far: -63 stays short of the midpoint.
    magnitude = values.view(torch.int16).int() & 0x7FFF
    closer = (magnitude & 0x7F == 0) & (magnitude > 0x80)
    least = torch.where(closer, -63.0, -127.0)
    return values, codes.clamp(max=127).maximum(least).to(torch.int8)


def join(values: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Invert `split`, to within 1/400 of a bf16 step (1/200 at a power of two).

    Args:
        values: (nnz,) bfloat16.
        residual: (nnz,) int8.

    Returns:
        (nnz,) float32; rounds to ``values`` again.
    """
    return values.float() + residual.float() / 127 * _outward_half_step(values) * _INSIDE


# A reconstruction must not reach the midpoint between two bf16 values, where it might round away.
_INSIDE = 1 - 2.0**-10


def _outward_half_step(values: torch.Tensor) -> torch.Tensor:
    """Half the way from each bf16 value to the next one away from zero, float32, signed."""
    bits = values.view(torch.int16).int()
    exponent = (bits >> 7 & 0xFF).clamp(min=1) - 127 - 8
    return torch.ldexp(torch.where(bits < 0, -1.0, 1.0), exponent)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    rest = -x.numel() % BLOCK
    return torch.nn.functional.pad(x, (0, rest)).view(-1, BLOCK)
