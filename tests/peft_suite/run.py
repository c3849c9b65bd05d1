"""Runs PEFT's own test suite, at the installed version, on SubnetConfig.

    python -m tests.peft_suite.run        # what `make peft-suite` does

Fetches PEFT's source distribution, which carries its tests, points them at us (`retarget`), runs
them in a process of their own and writes benchmarks/results/peft_suite.json: how many passed, were
skipped by themselves, or cannot apply, each kind with its reason. Exits with 1 if any other failed.
"""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.peft_suite.not_applicable import NOT_APPLICABLE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peft_suite.json"
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)


def fetch(folder: Path) -> Path:
    """Unpack the tests of the installed PEFT into a folder; return where pytest shall run."""
    wanted = f"peft=={version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wanted]
    options = ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    subprocess.run([*command, *options], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    run = folder / "run"
    shutil.copytree(next(folder.glob("peft-*/tests")), run / "tests")
    (run / "tests" / "__init__.py").touch()
    (run / "pytest.ini").write_text("[pytest]\n")  # theirs asks for coverage
    for name in ("retarget.py", "local_models.py"):
        shutil.copy(HERE / name, run / name)
    return run


def reason_for(name: str) -> str | None:
    """Return why a test cannot apply, None if it must pass."""
    plain = name.partition("[")[0]
    for pattern, reason in NOT_APPLICABLE.items():
        # Brackets are meant as they are.
        if plain == pattern or fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")):
            return reason
    return None


def main() -> int:
    """Run the suite, write the counts, say what failed."""
    with tempfile.TemporaryDirectory() as folder:
        run = fetch(Path(folder))
        report = run / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "retarget", "--tb=line"]
        paths = [str(run), str(ROOT), str(ROOT / "kernels" / "torch-ext")]
        subprocess.run(
            [*command, f"--junitxml={report}", *(f"tests/{name}" for name in FILES)],
            cwd=run,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
        cases = list(ElementTree.parse(report).iter("testcase"))
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong = []
    for case in cases:
        name = case.get("name", "")
        broken = case.find("failure") is not None or case.find("error") is not None
        reason = reason_for(name)
        if case.find("skipped") is not None:
            counts["skipped"] += 1
        elif reason is None:
            counts["failed" if broken else "passed"] += 1
            wrong += [f"failed: {name}"] if broken else []
        else:
            counts["not_applicable"] += 1
            reasons[f"{name.partition('[')[0]}: {reason}"] += 1
    RESULTS.write_text(
        json.dumps(
            {
                "peft": version("peft"),
                "files": FILES,
                **{key: counts[key] for key in ("passed", "failed", "skipped", "not_applicable")},
                "reasons": dict(sorted(reasons.items())),
            },
            indent=2,
        )
        + "\n"
    )
    print(*wrong, dict(counts), sep="\n")
    return 1 if wrong or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
