"""What does every kernel compile to, on GPUs that need not be there?

Each kernel, for each dtype and index type, is compiled for three CUDA architectures and one of
AMD's, with the largest blocks per thread of its search space, `weight_grad` with all of its. A row
holds registers a thread, bytes of stack frame, spilled vector and scalar registers and bytes of
shared memory. The run fails on a stack frame, a vector spill or more shared memory than the device
has.

    python -m benchmarks.aot            # writes benchmarks/results/aot.json
    python -m benchmarks.aot --check    # compares with it instead

Run it without TRITON_INTERPRET, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from subnet_kernels import (
    adamw,
    adamw_bitmap,
    adamw_small,
    bitmap,
    gather,
    scatter,
    weight_grad,
)
from subnet_kernels._tune import SEARCH, Config
from subnet_kernels.encoding import TILE_COLS

RESULTS = Path(__file__).parent / "results" / "aot.json"
KIB = 1024
# Shared memory one program may use, bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
FLOATS = {tl.float32: "fp32", tl.bfloat16: "bf16", tl.float16: "fp16"}  # in a signature
INDICES = (tl.int32, tl.int64)
HEAVIEST = max(SEARCH, key=lambda config: config.block / config.num_warps)
# Dynamic arguments of the kernels `_launch.launch` runs; any other is a number, fp32.
TABLE = {"table_ptr": "*i64", "tensor_of_ptr": "*i32", "scale_ptr": "*fp32"}


class Case(NamedTuple):
    """A kernel with everything that its compilation depends on, the target aside.

    `types` are those of its dynamic arguments, `options` the compiler's, `labels` what a row says.
    """

    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    options: dict[str, int]
    labels: dict[str, Any]


def over_table(kernel: Any, constants: dict[str, Any], config: Config) -> Case:
    """Return the case of a kernel that `_launch.launch` runs."""
    labels = {
        name.lower(): c.name if isinstance(c, tl.dtype) else c for name, c in constants.items()
    }
    return Case(
        kernel,
        constants | {"BLOCK": config.block},
        TABLE,
        {"num_warps": config.num_warps},
        labels | {"block": config.block, "num_warps": config.num_warps},
    )


def weight_grad_cases() -> Iterator[Case]:
    """Yield every dtype and configuration of `weight_grad`."""
    types = {"bits_ptr": "*u8", "offsets_ptr": "*i64", "out_ptr": "*fp32"}
    types |= dict.fromkeys(("tokens", "rows", "cols"), "i32")
    for dtype, short in FLOATS.items():
        inputs = dict.fromkeys(("dy_ptr", "x_ptr"), f"*{short}")
        for config in weight_grad.SEARCH:
            tile = {"ROWS": config.rows, "TOKENS": config.tokens}
            yield Case(
                weight_grad._weight_grad_kernel,
                {**tile, "COLS": TILE_COLS, "ACCUMULATE": True, "WIDEN": False},
                types | inputs,
                {"num_warps": config.num_warps, "num_stages": config.num_stages},
                {"dense": dtype.name, **config._asdict()},
            )


def small_cases() -> Iterator[Case]:
    """Yield 8-bit moments on every dtype, a residual, with either moments, on bf16 alone."""
    codes, moments = (tl.int8, tl.uint8), (tl.float32, tl.float32)
    kinds = [(dense, codes, tl.float32) for dense in FLOATS]
    kinds += [(tl.bfloat16, kind, tl.bfloat16) for kind in (moments, codes)]
    for dense, (exp_avg, exp_avg_sq), master in kinds:
        state = dict.fromkeys(("VALUES", "GRADS"), master)
        state |= {"EXP_AVGS": exp_avg, "EXP_AVG_SQS": exp_avg_sq}
        state |= dict.fromkeys(("EXP_AVG_SCALES", "EXP_AVG_SQ_SCALES"), tl.float32)
        for index in INDICES:
            constants = {"DENSE": dense, "INDEX": index, **state, "RESIDUALS": tl.int8}
            config = max(adamw_small.SEARCH)
            yield over_table(adamw_small._adamw_small_kernel, constants, config)


def cases() -> Iterator[Case]:
    """Yield every kernel with every dtype and index type; compact tensors are fp32."""
    out, values = {"OUT": tl.float32}, {"VALUES": tl.float32}
    state = dict.fromkeys(("VALUES", "GRADS", "EXP_AVGS", "EXP_AVG_SQS"), tl.float32)
    for dense in FLOATS:
        for index in INDICES:
            flat = {"DENSE": dense, "INDEX": index}
            for accumulate in (False, True):
                constants = {**flat, **out, "ACCUMULATE": accumulate}
                yield over_table(gather._gather_kernel, constants, HEAVIEST)
            yield over_table(scatter._scatter_kernel, {**flat, **values}, HEAVIEST)
            yield over_table(adamw._adamw_kernel, {**flat, **state}, HEAVIEST)
        bits = {"DENSE": dense, "BITS": tl.uint8, "OFFSETS": tl.int64}
        for accumulate in (False, True):
            constants = {**bits, **out, "ACCUMULATE": accumulate}
            yield over_table(bitmap._gather_bitmap_kernel, constants, bitmap.CONFIG)
        yield over_table(bitmap._scatter_bitmap_kernel, {**bits, **values}, bitmap.CONFIG)
        yield over_table(adamw_bitmap._adamw_bitmap_kernel, {**bits, **state}, bitmap.CONFIG)
    yield from small_cases()
    yield from weight_grad_cases()


def compile_row(number: int, target: str) -> dict[str, Any]:
    """Compile the case of that number for a target.

    Returns:
        A row of the table.
    """
    case = list(cases())[number]
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "fp32")
        for name in case.kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("rows", "cols")
    }
    compiled = triton.compile(
        ASTSource(case.kernel, signature, case.constants, aligned),
        target=TARGETS[target][0],
        options=case.options,
    )
    asm = compiled.asm
    usage = cuda_usage(asm["cubin"]) if "cubin" in asm else amd_usage(asm["amdgcn"])
    return {
        "kernel": case.kernel.fn.__name__.strip("_"),
        **case.labels,
        "target": target,
        **usage,
        "shared": max(usage["shared"], compiled.metadata.shared),
    }


def cuda_usage(cubin: bytes) -> dict[str, int]:
    """Read what a cubin uses. A spill on CUDA goes to the stack frame or to local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", text)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "spills": found["LOCAL"],
        "scalar_spills": 0,
        "shared": found["SHARED"],
    }


def amd_usage(assembly: str) -> dict[str, int]:
    """Read what an AMD kernel uses from the metadata that ends its assembly."""

    def number(field: str) -> int:
        match = re.search(rf"\.{field}:\s*(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"expected .{field} in the assembly's metadata, found none")
        return int(match[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
        "shared": number("group_segment_fixed_size"),
    }


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Say what is wrong with each row that breaks a rule, the worst first in a row."""
    found = []
    for row in rows:
        limit = TARGETS[row["target"]][1]
        for wrong, what in (
            (row["stack"] > 0, f"stack frame of {row['stack']} bytes"),
            (row["spills"] > 0, f"{row['spills']} spilled vector registers"),
            (row["shared"] > limit, f"{row['shared']} bytes of shared memory, limit {limit}"),
        ):
            if wrong:
                found.append(f"{describe(row)}: {what}")
    return found


def describe(row: dict[str, Any]) -> str:
    """Name a row: what was compiled, and for what."""
    usage = {"registers", "stack", "spills", "scalar_spills", "shared"}
    return " ".join(f"{k}={v}" for k, v in row.items() if k not in usage)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say where two tables differ."""
    if old["versions"] != new["versions"]:
        return [f"the table was made with {old['versions']}, this is {new['versions']}"]
    before = {describe(row): row for row in old["rows"]}
    after = {describe(row): row for row in new["rows"]}
    return [
        f"{name}: the table has {before.get(name)}, this is {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compile everything, judge it, and write or compare the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("expected TRITON_INTERPRET unset, found it set; unset it: nothing compiles under it")
        return 2
    jobs = [(i, target) for i in range(len(list(cases()))) for target in TARGETS]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        rows = pool.starmap(compile_row, jobs, chunksize=4)
    table = {"versions": {"triton": version("triton")}, "rows": rows}
    wrong = failures(rows)
    if options.check and not wrong:
        wrong = differences(json.loads(RESULTS.read_text()), table)
    if wrong:
        print(f"{len(wrong)} of {len(rows)} rows fail, the first: {wrong[0]}")
        return 1
    if not options.check:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        versions = json.dumps(table["versions"])
        RESULTS.write_text(f'{{"versions": {versions}, "rows": [\n  {lines}\n]}}\n')
    print(f"{len(rows)} compilations: no stack frame, no vector spill, shared memory within limits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
