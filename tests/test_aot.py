"""Every kernel compiles for GPUs that are not here, spills nothing, and the table says how."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """This one, but for the interpreter: it would leave nothing to compile."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext")])}


def test_the_committed_table_is_what_the_kernels_compile_to() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--check"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "no vector spill" in done.stdout


def test_a_row_that_breaks_a_rule_fails() -> None:
    code = (
        "from benchmarks.aot import failures\n"
        "good = dict(target='gfx942', stack=0, spills=0, scalar_spills=3, shared=65536)\n"
        "assert failures([good]) == []\n"
        "for bad in (dict(stack=8), dict(spills=1), dict(shared=65537)):\n"
        "    assert len(failures([good, good | bad])) == 1, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


# Stands in for a driver: says which GPU to compile for, launches nothing.
LAUNCHERS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, *_: 0

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def compile(*arguments, **constants):
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            print(self.kernel.fn.__name__, *compiled.src.signature.values())
        return compile

driver.set_active(Driver())
from subnet_kernels import _launch, _tune, encoding, jitted
run_group = _launch.run_group
_launch.run_group = lambda kernel, *a, **k: run_group(Compiled(kernel), *a, **k)
_launch.best_config = lambda *_: _tune.SEARCH[0]
dense, indices, out = torch.ones(4, 5).bfloat16(), torch.arange(0, 20, 3), torch.ones(7)
bitmap, state = encoding.encode_bitmap(indices, 20), [[torch.ones(7)] for _ in range(4)]
numbers = dict(step=1, lr=1e-3, beta1=0.9, beta2=0.99, eps=0, weight_decay=0)
try:
    jitted.gather(dense, indices, out)
except ValueError as error:
    assert "expected tensors on a GPU" in str(error)
else:
    raise AssertionError("a CPU tensor was not refused")
_launch.is_interpreted = lambda _: True
jitted.gather(dense, indices.int(), out, accumulate=True)
jitted.scatter_(dense, indices, out)
jitted.adamw_step_(*state, [dense], [indices], **numbers)
small = [[torch.ones(7).bfloat16()], [torch.ones(7).bfloat16()]]
small += [[torch.ones(7, dtype=dtype)] for dtype in (torch.int8, torch.uint8)]
scales = dict.fromkeys(("exp_avg_scales", "exp_avg_sq_scales"), [torch.ones(1)])
jitted.adamw_small_step_(*small, [dense], [indices], residuals=small[2], **scales, **numbers)
jitted.gather_bitmap(dense, bitmap, out)
jitted.scatter_bitmap_(dense, bitmap, out)
jitted.adamw_bitmap_step_(*state, [dense], [bitmap], **numbers, grad_scale=torch.ones(()))
"""


def test_launchers_call_compiled_kernels_as_the_table_assumes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHERS],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    types = {name: rest for name, *rest in map(str.split, done.stdout.splitlines())}
    assert len(types) == 7
    for name, signature in types.items():
        scalars = ["*fp32", *["fp32"] * (7 + ("small" in name))] if "adamw" in name else []
        dynamic = ["*i64", "*i32", *scalars]
        assert signature == dynamic + ["constexpr"] * (len(signature) - len(dynamic)), name
