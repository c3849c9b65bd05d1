"""The torch operators: what torch expects of them, in a full graph, and each copy with its own."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from subnet_kernels import _ops, twins
from tests.helpers import assert_same_bits
from tests.kernel_helpers import DEVICE, HYPER
from tests.test_kernels import KERNEL_ROOT


def step_operands(kind: str) -> list[list[Tensor]]:
    """Every list of `_ops.adamw_step_` for two tensors, the state fp32 or small."""
    torch.manual_seed(0)
    small, sizes = kind == "small", (7, 300)
    master = torch.bfloat16 if small else torch.float32
    moments = (torch.int8, torch.uint8) if small else (torch.float32, torch.float32)
    scales = [torch.ones(-(-n // 256)) for n in sizes]
    return [
        [torch.randn(n).to(master) for n in sizes],
        [torch.randn(n).to(master) for n in sizes],
        *([torch.ones(n, dtype=dtype) for n in sizes] for dtype in moments),
        [torch.randn(n).bfloat16() for n in (20, 400)],
        [torch.arange(0, 20, 3), torch.arange(50, 350)],
        scales if small else [],
        [scale.clone() for scale in scales] if small else [],
        [torch.zeros(n, dtype=torch.int8) for n in sizes] if small else [],
    ]


NUMBERS = (1, *(HYPER[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")))


def test_one_operator_steps_with_any_state() -> None:
    for kind in ("fp32", "small"):
        found, right = (
            tree_map_only(Tensor, lambda t: t.to(DEVICE), step_operands(kind)) for _ in "ab"
        )
        _ops.adamw_step_(*found, torch.tensor(0.5, device=DEVICE), *NUMBERS)
        options = dict(
            zip(("exp_avg_scales", "exp_avg_sq_scales", "residuals"), right[6:], strict=True)
        )
        twin = twins.adamw_small_step_ if kind == "small" else twins.adamw_step_
        twin(*right[:6], **(options if kind == "small" else {}), step=1, grad_scale=0.5, **HYPER)
        for ours, theirs in zip(found, right, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(
                    a, b, rtol=1e-6, atol=1e-6 if a.is_floating_point() else 1
                )


OPERANDS = {
    "gather": lambda: (torch.randn(4, 5), torch.arange(0, 20, 3)),
    "gather_into": lambda: (torch.randn(4, 5), torch.arange(0, 20, 3), torch.ones(7), True),
    "scatter_": lambda: (torch.randn(4, 5).bfloat16(), torch.arange(0, 20, 3), torch.randn(7)),
    "adamw_step_ fp32": lambda: (*step_operands("fp32"), torch.tensor(1.0), *NUMBERS),
    "adamw_step_ small": lambda: (*step_operands("small"), torch.tensor(1.0), *NUMBERS),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operators_are_what_torch_expects(name: str) -> None:
    arguments = tree_map_only(Tensor, lambda a: a.to(DEVICE), OPERANDS[name]())
    torch.library.opcheck(getattr(_ops, name.partition(" ")[0]), arguments)


def test_operators_keep_a_full_graph() -> None:
    def step(dense: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        _ops.scatter_(dense, indices, values * 2)
        _ops.gather_into(dense, indices, values, True)
        return _ops.gather(dense, indices) + values

    dense, indices, values = (a.to(DEVICE) for a in OPERANDS["scatter_"]())
    other, same = dense.clone(), values.clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(dense, indices, values), step(other, indices, same))
    assert_same_bits(dense, other)
    assert_same_bits(values, same)


def test_a_copy_under_another_name_has_operators_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(KERNEL_ROOT / "subnet_kernels", tmp_path / "staged_copy")
    monkeypatch.syspath_prepend(tmp_path)
    staged = importlib.import_module("staged_copy._ops")
    monkeypatch.setattr(staged.reference, "gather", lambda dense, indices: torch.zeros(1))
    dense, indices = torch.ones(2), torch.arange(2)
    assert torch.ops.staged_copy.gather(dense, indices).tolist() == [0.0]
    assert torch.ops.subnet_kernels.gather(dense, indices).tolist() == [1.0, 1.0]
