"""Jitted helpers that several kernels share. Only language builtins: they run interpreted too."""

import triton
import triton.language as tl


@triton.jit
def find_work(
    table_ptr: tl.tensor, tensor_of_ptr: tl.tensor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Find which tensor this program works on, and where in it.

    Args:
        table_ptr: (tensors, COLUMNS + 2) int64, see `LaunchTable`.
        tensor_of_ptr: (programs,) int32, the tensor of each program.
        COLUMNS: pointers a tensor has.
        BLOCK: entries a program works on.

    Returns:
        Pointer to the tensor's row, the program's block within the tensor, its first entry and the
        tensor's length; all int64, since both dense tensors and tables of them pass 2**31.
    """
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tensor_of_ptr + program).to(tl.int64) * (COLUMNS + 2)
    block = program - tl.load(row_ptr + COLUMNS + 1)
    return row_ptr, block, block * BLOCK, tl.load(row_ptr + COLUMNS)


@triton.jit
def pointer(row_ptr: tl.tensor, column: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Rebuild a column's pointer from its address."""
    return tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))


@triton.jit
def add(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return the sum: tl.sum and tl.cumsum run interpreted only if triton was imported so."""
    return a + b


@triton.jit
def larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return the larger one, NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Round fp32 to DTYPE, to nearest, ties to even.

    For bfloat16 in integers: the interpreter would truncate, and some devices have no instruction
    for it. Five integer operations hide behind the memory traffic of every kernel here.
    """
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x != x, 0x7FC0, bits)
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def converted(x: tl.tensor, SOURCE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Return x, of type SOURCE, as DTYPE: bit for bit where they agree, else rounded."""
    if SOURCE == DTYPE:
        result = x
    else:
        result = rounded(x.to(tl.float32), DTYPE)
    return result
