"""How fast is each operation, and how fast could it be? Measured beside a model of bytes moved.

    python -m benchmarks.kernels

100M bf16 weights in 140 tensors, masked at random. On a GPU the Triton kernels run, first compared
with their torch twins on the very same operands, beside the twins themselves and `torch.compile` of
them; on a CPU the twins run. A row has the bytes the model says, the time that the copy bandwidth
measured beside it would take for them, the time it took, and against torch's dense fused AdamW and
bitsandbytes' 8-bit one over all weights (fp32) how much of theirs that is. Interleaved, medians.

The model: compact tensors and index are read and written once; of the dense tensor every line that
holds an entry, that is 1 - (1 - d)**n of all lines at density d, n elements a line (64 bytes on a
CPU, 32 on a GPU), read, and read and written where it is changed.

`weight_grad` stands apart: against the dense gradient (a matrix product) and a gather from it, for
shapes and tokens. Its rule when it pays, `subnet_ft.adapter.linear.pays`, is drawn from here.

Writes benchmarks/results/kernels_<device>.json and prints two tables.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.optimizer import SHAPES, machine
from subnet_kernels import encoding, small_state, twins

DENSITIES = (0.2, 0.05, 0.01)
ROUNDS, WARMUP = 9, 2
NUMBERS = {"lr": 1e-6, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
LINEAR = ((576, 576), (1536, 576), (2048, 2048), (8192, 2048))  # rows, cols
TOKENS = (128, 512, 2048)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LINE = 32 if DEVICE.type == "cuda" else 64  # bytes memory moves at least


class Operation(NamedTuple):
    """One row: `bytes` by the model, `run` given the twins or the kernels."""

    name: str
    bytes: float
    run: Callable[[Any], Any]


class Problem:
    """Everything the operations work on at one density."""

    def __init__(self, density: float) -> None:
        torch.manual_seed(0)
        self.density = density
        self.denses = [torch.randn(shape, device=DEVICE).bfloat16() for shape in SHAPES]
        self.indices = [self._entries(dense.numel()) for dense in self.denses]
        self.bitmaps = [
            encoding.encode_bitmap(index, dense.numel())
            for index, dense in zip(self.indices, self.denses, strict=True)
        ]
        self.values = twins.gather_many(self.denses, self.indices, self._like(torch.float32))
        self.grads = [torch.randn_like(value) for value in self.values]
        self.out = self._like(torch.float32)
        self.moments = [[torch.zeros_like(v) for v in self.values] for _ in range(2)]
        self.rounded, self.residuals = self._like(torch.bfloat16), self._like(torch.int8)
        self.codes = [self._like(torch.int8), self._like(torch.uint8)]
        blocks = [-(-len(index) // small_state.BLOCK) for index in self.indices]
        self.scales = [[torch.zeros(n, device=DEVICE) for n in blocks] for _ in range(2)]

    def _entries(self, numel: int) -> Tensor:
        kept = torch.rand(numel, device=DEVICE) < self.density
        kept[0] = True
        return kept.nonzero().flatten()

    def _like(self, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(len(index), dtype=dtype, device=DEVICE) for index in self.indices]

    def operations(self) -> Iterator[Operation]:
        """Yield every row."""
        numel = sum(dense.numel() for dense in self.denses)
        nnz = sum(map(len, self.indices))
        touched = numel * 2 * (1 - (1 - self.density) ** (LINE / 2))
        flat = 8 * nnz
        bitmap = sum(b.nbytes for pair in self.bitmaps for b in pair)
        state = [self.values, self.grads, *self.moments, self.denses]
        small = [self.rounded, self.grads, *self.codes, self.denses]
        step = {"step": 1, **NUMBERS}
        options = {
            "exp_avg_scales": self.scales[0],
            "exp_avg_sq_scales": self.scales[1],
            "residuals": self.residuals,
            **step,
        }
        yield Operation(
            "gather, indices",
            touched + flat + 4 * nnz,
            lambda m: m.gather_many(self.denses, self.indices, self.out),
        )
        yield Operation(
            "scatter_, indices",
            2 * touched + flat + 4 * nnz,
            lambda m: m.scatter_many_(self.denses, self.indices, self.values),
        )
        yield Operation(
            "adamw_step_, indices",
            2 * touched + flat + 28 * nnz,
            lambda m: m.adamw_step_(*state, self.indices, **step),
        )
        yield Operation(
            "adamw_small_step_, indices",
            2 * touched + flat + (4 + 6 + 4 + 16 / small_state.BLOCK) * nnz,
            lambda m: m.adamw_small_step_(*small, self.indices, **options),
        )
        yield Operation(
            "gather, bitmap",
            touched + bitmap + 4 * nnz,
            lambda m: m.gather_bitmap_many(self.denses, self.bitmaps, self.out),
        )
        yield Operation(
            "scatter_, bitmap",
            2 * touched + bitmap + 4 * nnz,
            lambda m: m.scatter_bitmap_many_(self.denses, self.bitmaps, self.values),
        )
        yield Operation(
            "adamw_step_, bitmap",
            2 * touched + bitmap + 28 * nnz,
            lambda m: m.adamw_bitmap_step_(*state, self.bitmaps, **step),
        )

    def changed(self) -> list[Tensor]:
        """Return copies of all that an operation may change."""
        lists = (self.denses, self.values, self.rounded, self.out, *self.moments)
        return [tensor.clone() for of in lists for tensor in of]


def implementations() -> dict[str, Any]:
    """Return what runs here, by name: the first is ours."""
    if DEVICE.type == "cpu":
        return {"torch": twins}
    from subnet_kernels import jitted

    return {"triton": jitted, "torch": twins}


def gate(problem: Problem) -> None:
    """Compare every kernel with its twin on the operands that will be timed.

    Raises:
        RuntimeError: One differs by more than rounding.
    """
    for operation in problem.operations():
        found = []
        for module in implementations().values():
            torch.manual_seed(0)
            fresh = Problem(problem.density)
            match = next(o for o in fresh.operations() if o.name == operation.name)
            match.run(module)
            found.append(fresh.changed())
        for ours, theirs in zip(*found, strict=True):
            if not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-6):
                raise RuntimeError(f"{operation.name}: the kernel differs from its twin")


def seconds(runs: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median seconds of each, called in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + WARMUP):
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[WARMUP:]) for name, times in taken.items()}


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def dense_steps() -> dict[str, Callable[[], Any]]:
    """Return a step of each dense optimizer over all weights, fp32."""
    steps = {}
    for name, optimizer in (
        ("dense fused", lambda p: torch.optim.AdamW(p, fused=True)),
        ("dense bnb 8-bit", bitsandbytes.optim.AdamW8bit),
    ):
        weights = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in SHAPES]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        steps[name] = optimizer(weights).step
    return steps


def operation_rows() -> list[dict[str, Any]]:
    """Time every operation at every density beside a copy and the dense optimizers."""
    dense = dense_steps()
    source = torch.randn(50_000_000, device=DEVICE)
    target = torch.empty_like(source)
    rows = []
    for density in track(DENSITIES, "operations"):
        problem = Problem(density)
        if DEVICE.type == "cuda":
            gate(problem)
        operations = {operation.name: operation for operation in problem.operations()}
        runs: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), **dense}
        for kind, module in implementations().items():
            for name, operation in operations.items():
                runs[f"{name}, {kind}"] = lambda o=operation, m=module: o.run(m)
                if DEVICE.type == "cuda" and module is twins:
                    compiled = torch.compile(lambda o=operation: o.run(twins))
                    runs[f"{name}, compiled"] = compiled
        times = seconds(runs)
        bandwidth = 2 * source.nbytes / times["copy"]
        for name, taken in times.items():
            operation = operations.get(name.rpartition(", ")[0])
            row = {"density": density, "what": name, "ms": taken * 1e3}
            row |= {f"of {what}": taken / times[what] for what in dense}
            if operation is not None:
                row |= {
                    "bytes": operation.bytes,
                    "predicted_ms": operation.bytes / bandwidth * 1e3,
                    "GB/s": operation.bytes / taken / 1e9,
                    "share_of_copy_bandwidth": operation.bytes / taken / bandwidth,
                }
            rows.append(row)
    return rows


def weight_grad_rows() -> list[dict[str, Any]]:
    """Time `weight_grad` against a matrix product and a gather from it, both at 5%."""
    rows = []
    ours = next(iter(implementations().values()))
    dtypes = (torch.float32, torch.bfloat16)
    for (height, width), dtype in track([(s, d) for s in LINEAR for d in dtypes], "weight_grad"):
        kept = torch.rand(height * width, device=DEVICE) < 0.05
        indices = kept.nonzero().flatten()
        tiles = encoding.encode_tiles(indices, height, width)
        for tokens in TOKENS:
            dy = torch.randn(tokens, height, device=DEVICE).to(dtype)
            x = torch.randn(tokens, width, device=DEVICE).to(dtype)
            times = seconds(
                {
                    "dense": lambda dy=dy, x=x, i=indices: twins.gather(dy.t() @ x, i),
                    "compact": lambda dy=dy, x=x, i=indices, t=tiles: ours.weight_grad(
                        dy, x, i, tiles=t
                    ),
                },
                rounds=5,
            )
            rows.append(
                {"rows": height, "cols": width, "tokens": tokens, "dtype": str(dtype)[6:]}
                | {f"{name}_ms": taken * 1e3 for name, taken in times.items()}
                | {"ratio": times["compact"] / times["dense"]}
                | {"dense_gradient_bytes": height * width * dtype.itemsize}
            )
    return rows


def main() -> None:
    """Measure, write the file, print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    output = parser.parse_args().output
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    table = {
        "machine": machine() | {"device": name, "threads": torch.get_num_threads()},
        "weight_grad": weight_grad_rows(),  # first: no allocations of others to live off
        "operations": operation_rows(),
    }
    (output / f"kernels_{DEVICE.type}.json").write_text(json.dumps(table, indent=1) + "\n")
    show(table)


def show(results: dict[str, Any]) -> None:
    """Print both tables."""
    console = Console(width=120)
    table = Table("density", "what", "ms", "predicted", "GB/s", "of copy", "of dense", "of 8-bit")
    for row in results["operations"]:
        figures = [""] * 3
        if "bytes" in row:
            share = f"{row['share_of_copy_bandwidth']:.0%}"
            figures = [f"{row['predicted_ms']:.1f}", f"{row['GB/s']:.1f}", share]
        shares = (f"{share:.2f}" for key, share in row.items() if key.startswith("of "))
        table.add_row(f"{row['density']:.0%}", row["what"], f"{row['ms']:.2f}", *figures, *shares)
    console.print(table)
    table = Table("rows, cols", "dtype", "tokens", "dense, ms", "compact, ms", "ratio")
    for row in results["weight_grad"]:
        table.add_row(
            f"{row['rows']}, {row['cols']}",
            row["dtype"],
            str(row["tokens"]),
            f"{row['dense_ms']:.2f}",
            f"{row['compact_ms']:.2f}",
            f"{row['ratio']:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
