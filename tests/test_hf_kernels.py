"""The kernel project in `kernels/`, loaded by Hugging Face's `kernels` beside the installed copy.

Staged as a noarch build leaves it. Both copies live in a process of their own: operators stay
registered for good, and which package answers to the name `kernels` depends on where one starts.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "kernels"
SOURCES = PROJECT / "torch-ext"
OPERATORS = {"gather": "gather", "gather_into": "gather", "scatter_": "scatter_"}  # op: its twin


def stage(directory: Path) -> dict:
    """Lay the project out as its build would: one folder a backend, each with its metadata."""
    general = tomllib.loads((PROJECT / "build.toml").read_text())["general"]
    name = general["name"].replace("-", "_")
    for backend in general["backends"]:
        variant = directory / "build" / f"torch-{backend}"
        shutil.copytree(SOURCES / name, variant, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {
            "id": f"_{name}_{backend}_3f9c2d1",
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata))
    return general


def run(staged: Path, cwd: Path, check: str) -> None:
    paths = os.pathsep.join([str(cwd), str(ROOT), str(SOURCES)])
    interpret = "0" if torch.cuda.is_available() else "1"
    done = subprocess.run(
        [sys.executable, __file__, check, str(staged)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["elsewhere", "beside the folder kernels/"])
@pytest.mark.parametrize("check", ["operators", "launchers"])
def test_two_copies_in_one_process(check: str, where: str, tmp_path: Path) -> None:
    pytest.importorskip("kernels")
    stage(tmp_path / "staged")
    run(tmp_path / "staged", tmp_path if where == "elsewhere" else ROOT, check)


def test_the_builder_s_own_parser_takes_the_project() -> None:
    pytest.importorskip("kernels")
    from kernels._rust import Build

    Build.open(str(PROJECT))


# What follows runs in the process that `run` starts.


def both(staged: Path) -> tuple[ModuleType, ModuleType]:
    import kernels
    import subnet_kernels

    assert PROJECT not in Path(kernels.__file__).parents
    loaded = kernels.get_local_kernel(staged)
    assert loaded.__name__ != subnet_kernels.__name__
    assert staged in Path(loaded.__file__).parents
    assert SOURCES in Path(subnet_kernels.__file__).parents
    return loaded, subnet_kernels


def submodule(package: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f".{name}", package.__name__)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = torch.randn(37, 53, device=device).to(torch.bfloat16)
    return dense, torch.arange(0, dense.numel(), 3, device=device)


def results(functions: object, steps: tuple[str, ...]) -> list[torch.Tensor]:
    dense, indices = example()
    values = functions.gather(dense, indices)
    into = torch.zeros_like(values)
    if "gather_into" in steps:
        functions.gather_into(dense, indices, into, True)
    functions.scatter_(dense, indices, values * 1.5)
    return [dense, values, into]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def operators(staged: Path) -> None:
    """Each namespace's operators run their own copy: of code that is swapped, only one notices."""
    packages = both(staged)
    spaces = [submodule(package, "_ops").NAMESPACE for package in packages]
    assert len(set(spaces)) == 2 and spaces[1] == "subnet_kernels"
    found = [getattr(torch.ops, space) for space in spaces]
    assert same(*(results(ops, tuple(OPERATORS)) for ops in found))

    dense, indices = (x.cpu() for x in example())  # on a CPU an operator runs its twin
    arguments = {
        "gather": (dense, indices),
        "gather_into": (dense, indices, torch.zeros(len(indices))),
        "scatter_": (dense, indices, torch.zeros(len(indices))),
    }
    for package, own, other in zip(packages, found, reversed(found), strict=True):
        for name, twin in OPERATORS.items():
            called: list[str] = []
            module, genuine = package.reference, getattr(package.reference, twin)

            def spy(*args, genuine=genuine, called=called, **kwargs):  # type: ignore[no-untyped-def]
                called.append("spy")
                return genuine(*args, **kwargs)

            setattr(module, twin, spy)
            getattr(other, name)(*arguments[name])
            assert not called, (package.__name__, name)
            getattr(own, name)(*arguments[name])
            assert called == ["spy"], (package.__name__, name)
            setattr(module, twin, genuine)


def launchers(staged: Path) -> None:
    """Triton kernels and twins of both copies agree; here the kernels are interpreted."""
    sides = [getattr(p, side) for p in both(staged) for side in ("jitted", "twins")]
    assert len({side.__name__ for side in sides}) == 4
    first, *rest = [results(side, ("gather", "scatter_")) for side in sides]
    assert all(same(first, other) for other in rest)


if __name__ == "__main__":
    {"operators": operators, "launchers": launchers}[sys.argv[1]](Path(sys.argv[2]))
