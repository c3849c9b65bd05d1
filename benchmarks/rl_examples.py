"""What the PPO, PRIME and rejection-sampling examples learn on the real task.

    python -m benchmarks.rl_examples

Runs `examples/ppo.py`, `prime.py` and `rft.py` (RFT, and three rounds: RAFT++), each as its
docstring says and once: a random 2% of the linear layers, the default learning rate, seed 0.
Runs that already lie under runs/rl_examples are not made again. Writes
benchmarks/results/rl_examples.json and prints a table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.optimizer import machine
from benchmarks.rl_task_compare import wilson

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "rl_examples"
RESULTS = Path(__file__).parent / "results" / "rl_examples.json"
COMMANDS = {
    "PPO": ["ppo.py"],
    "PRIME": ["prime.py"],
    "RFT": ["rft.py"],
    "RAFT++": ["rft.py", "--rounds", "3"],
}
HELD_OUT = 100


def main() -> None:
    """Make the runs that are missing, write the file, print the table."""
    runs = {name: run(name, command) for name, command in COMMANDS.items()}
    RESULTS.write_text(
        json.dumps({"machine": machine(), "heldout_problems": HELD_OUT, "runs": runs}, indent=1)
        + "\n"
    )
    table = Table("example", "held-out before", "after", "95%", "CPU minutes", "learning rate")
    for name, figures in runs.items():
        low, high = figures["heldout_after_wilson"]
        table.add_row(
            name,
            f"{figures['heldout_before']:.0%}",
            f"{figures['heldout_after']:.0%}",
            f"{low:.0%}-{high:.0%}",
            f"{figures['cpu_seconds'] / 60:.1f}",
            f"{figures['options']['learning_rate']:g}",
        )
    Console().print(table)


def run(name: str, command: list[str]) -> dict[str, Any]:
    """Make one run in a process of its own, unless it is there; return its summary."""
    output = RUNS / name.lower()
    if not (output / "summary.json").exists():
        script, *extra = command
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / script), *extra, "--output", str(output)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    summary = json.loads((output / "summary.json").read_text())
    summary["options"]["output"] = f"runs/rl_examples/{output.name}"
    for when in ("before", "after"):
        summary[f"heldout_{when}_wilson"] = wilson(summary[f"heldout_{when}"], HELD_OUT)
    return {"command": ["python", f"examples/{command[0]}", *command[1:]], **summary}


if __name__ == "__main__":
    main()
