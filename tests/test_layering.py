"""The package's shape: who imports whom, what a plain import costs, what a wheel holds."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import subnet_ft

ROOT = Path(__file__).parents[1]

# Left never imports right; modules of one group may import one another.
ORDER = [
    {"errors"},
    {"storage", "names"},
    {"mask"},
    {"mask_file"},
    {"adapter_file"},
    {"checkpoints"},
    {"ops"},
    {"extract", "merge", "selectors"},
    {"sign_sgd"},
    {"analysis"},
    {"adapter"},
    {"gradient_release"},
    {"optim"},
    {"meter"},
    {"callback"},
    {"discovery"},
    {"plan"},
    {"cli"},
]
RANK = {module: rank for rank, group in enumerate(ORDER) for module in group}
FREE = {"__init__", "peft_hook", "progress"}  # __init__ and the hook import lazily, by name


def _imports(path: Path) -> set[str]:
    """First components of subnet_ft modules imported at the file's top level."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "subnet_ft":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("subnet_ft."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("subnet_ft.")
            }
    return found


def _modules() -> list[Path]:
    return sorted((ROOT / "subnet_ft").rglob("*.py"))


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    module = path.relative_to(ROOT / "subnet_ft").with_suffix("").parts[0]
    if module in FREE:
        return
    assert module in RANK, f"{module} is not in the order; give it its place"
    for imported in _imports(path) - FREE:
        assert RANK[imported] <= RANK[module], f"{module} imports {imported}, to its right"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_one_idea_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


def test_kernels_import_only_torch_and_themselves() -> None:
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for path in (ROOT / "kernels" / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, path
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names_load() -> None:
    for name in subnet_ft.__all__:
        assert getattr(subnet_ft, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = subnet_ft.no_such_name
    assert set(subnet_ft.__all__) <= set(dir(subnet_ft))


def test_version_is_the_distribution_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == subnet_ft.__version__


def test_a_plain_import_is_light() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels/torch-ext')!r}]; "
        "import subnet_ft; heavy = {'torch', 'triton', 'transformers', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
