"""The main job end to end on SmolLM2-135M-Instruct: full run, mask, masked runs, comparison.

    python examples/quickstart.py [--steps 40] [--learning-rate 1e-5] [--output runs/quickstart]

1. `full`: DPO on every weight, fp32 weights under bf16 autocast.
2. The mask: which weights that run changed, in bf16.
3. `masked`: the same run on the mask's weights only; `masked_lean`: that from a bf16 base;
   `random_mask`: that on as many weights of each tensor, drawn at random.
4. All of them, the untouched base and two nulls against `full`.

Each run is a process of its own (`quickstart_run.py`). Expected last line:
`Wrote summary.json and quickstart.png to <output>.`
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from chain_sum import completion_logprobs, heldout_pairs
from rich import box
from rich.console import Console
from rich.table import Table
from smollm2 import HUB_ID, model_directory
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import subnet_ft
from subnet_ft import SubnetMask, extract_mask
from subnet_ft.analysis.agreement import measure_agreement
from subnet_ft.analysis.density import density_by, layer_of, matrix_type_of
from subnet_ft.analysis.nulls import measure_nulls
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.selectors import random_like

# Run -> what it is given besides the base: nothing means that everything is trained.
RUNS = {
    "full": [],
    "masked": ["--mask", "mask.safetensors"],
    "masked_lean": ["--mask", "mask.safetensors", "--dtype", "bfloat16"],
    "random_mask": ["--mask", "random_mask.safetensors"],
}
RANDOM_MASK_SEED = 1
NULL_SEED = 2
# What a run's process measures of itself; the untouched base has none of it.
RUN_FIGURES = [
    "final_loss",
    "peak_rss_bytes",
    "rss_after_imports_bytes",
    "trainable_parameters",
    "optimizer_bytes",
    "checkpoint_bytes",
    "seconds_per_step",
    "losses",
]
# The table needs this much, also where the output is a file, which rich takes for 80 columns.
console = Console(highlight=False, width=max(100, Console().width))


def main() -> None:
    """Runs everything and writes the summary and the figure."""
    options = parse_options()
    output = options.output
    started = time.perf_counter()
    base = model_directory()
    for name in RUNS:  # only what an earlier demo left here: the folder may hold other things
        shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)

    console.rule("1  full finetuning")
    train("full", base, options)
    console.rule("2  which weights did it change?")
    mask_file = output / "mask.safetensors"
    mask = extract_mask(base, output / "full", rule="bitwise", output=mask_file, overwrite=True)
    random_mask = random_like(mask, seed=RANDOM_MASK_SEED)
    random_mask.save(output / "random_mask.safetensors", overwrite=True)
    console.print(f"{mask.nnz:,} of {mask.numel:,} weights changed: density {mask.density:.1%}")
    console.rule("3  the same finetuning, of those weights only")
    for name in list(RUNS)[1:]:
        train(name, base, options)

    console.rule("4  comparison")
    summary = summarize(base, output, mask)
    summary["seconds"] = time.perf_counter() - started
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(summary, output / "quickstart.png")
    console.print(table(summary))
    console.print(f"Wrote summary.json and quickstart.png to {output}.")


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    return parser.parse_args()


def train(name: str, base: Path, options: argparse.Namespace) -> None:
    """Makes one run in a process of its own, which writes into `<output>/<name>`."""
    extra = [
        str(options.output / word) if word.endswith(".safetensors") else word for word in RUNS[name]
    ]
    script = Path(__file__).with_name("quickstart_run.py")
    command = [sys.executable, str(script), str(options.output / name), "--base", str(base)]
    command += ["--steps", str(options.steps), "--learning-rate", str(options.learning_rate)]
    # Everything is on disk by now: no library need ask the network for anything.
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    subprocess.run([*command, *extra], check=True, env={**os.environ, **quiet})


def summarize(base: Path, output: Path, mask: SubnetMask) -> dict[str, Any]:
    """Returns everything `summary.json` holds, except the whole demo's time."""
    runs = {name: json.loads((output / name / "run.json").read_text()) for name in RUNS}
    final = {"base": base, **{name: output / name / "final" for name in RUNS}}
    checkpoints = {name: open_checkpoint(directory) for name, directory in final.items()}
    before, after = checkpoints["base"], checkpoints["full"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    logprobs = {name: heldout_logprobs(name, final[name], tokenizer) for name in final}

    summary: dict[str, Any] = {"density": mask.density, "mask_weights": mask.nnz}
    for name in final:
        run = runs.get(name, {})
        summary[name] = {
            **measure_agreement(before, after, checkpoints[name], mask),
            **heldout_figures(logprobs[name], logprobs["base"], runs["full"]["settings"]["beta"]),
            **{key: run.get(key) for key in RUN_FIGURES},
        }
    # The base is its own reference: its margins are 0 by definition, neither right nor wrong.
    summary["base"]["heldout_accuracy"] = None
    summary["nulls"] = measure_nulls(before, after, mask, seed=NULL_SEED)
    for key, label in (("layer", layer_of), ("matrix_type", matrix_type_of)):
        groups = density_by(mask, label)
        summary[f"density_by_{key}"] = {group.label: group.density for group in groups}
    summary["settings"] = {
        "base_model": HUB_ID,
        "base_directory": base.name,
        "heldout_pairs": len(heldout_pairs()),
        "random_mask_seed": RANDOM_MASK_SEED,
        "null_seed": NULL_SEED,
        **{name: run["settings"] for name, run in runs.items()},
    }
    summary["environment"] = environment()
    return summary


def heldout_logprobs(
    name: str, directory: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log p of the chosen and of the rejected held-out answers under bf16 weights.

    The weights are bf16 for every run alike; the arithmetic is fp32, so that differences of
    log-probabilities are the weights' and not rounding's.
    """
    console.print(f"  {name}: held-out pairs")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).float().eval()
    chosen, rejected = (
        completion_logprobs(model, tokenizer, heldout_pairs(), side)
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def heldout_figures(
    policy: tuple[torch.Tensor, torch.Tensor],
    reference: tuple[torch.Tensor, torch.Tensor],
    beta: float,
) -> dict[str, float]:
    """Returns mean margin and preference accuracy, by DPO's implicit reward and by log p alone.

    The margin is beta * ((chosen - reference's) - (rejected - reference's)), in log p; a pair is
    right where it is positive.
    """
    gap, reference_gap = policy[0] - policy[1], reference[0] - reference[1]
    margin = beta * (gap - reference_gap)
    return {
        "heldout_accuracy": (margin > 0).float().mean().item(),
        "heldout_margin": margin.mean().item(),
        "heldout_logprob_accuracy": (gap > 0).float().mean().item(),
    }


def environment() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    packages = ["torch", "transformers", "trl", "peft", "reasoning-gym"]
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {
            "subnet-ft": subnet_ft.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def table(summary: dict[str, Any]) -> Table:
    """Lays the summary out, one column a run."""
    share, millions = "{:.1%}".format, lambda value: f"{value / 1e6:,.0f}"
    rows = {
        "equal weights, bitwise": ("agreement_bitwise", share),
        "equal weights, at 1e-5": ("agreement_1e-5", share),
        "in mask: equal, bitwise": ("in_mask_agreement_bitwise", share),
        "in mask: equal, at 1e-5": ("in_mask_agreement_1e-5", share),
        "in mask: same sign": ("in_mask_sign_agreement", share),
        "held-out: accuracy": ("heldout_accuracy", share),
        "held-out: margin": ("heldout_margin", "{:.4f}".format),
        "held-out: log p accuracy": ("heldout_logprob_accuracy", share),
        "final loss": ("final_loss", "{:.4f}".format),
        "peak RSS over imports, MB": ("peak_over_imports", millions),
        "trained numbers, M": ("trainable_parameters", lambda value: f"{value / 1e6:,.1f}"),
        "optimizer state, MB": ("optimizer_bytes", millions),
        "checkpoint, MB": ("checkpoint_bytes", millions),
        "seconds a step": ("seconds_per_step", "{:.2f}".format),
    }
    nulls = {
        "1 ulp, coin flip": summary["nulls"]["one_ulp_coin_flip"],
        "1 ulp, right way": summary["nulls"]["one_ulp_right_direction"],
    }
    columns = {name: dict(summary[name]) for name in ("base", *RUNS)} | nulls
    for name in RUNS:
        column = columns[name]
        column["peak_over_imports"] = column["peak_rss_bytes"] - column["rss_after_imports_bytes"]

    title = f"Against the full run, in bf16; mask density {summary['density']:.1%}"
    result = Table(title=title, box=box.SIMPLE)
    result.add_column("", no_wrap=True)
    for name in columns:
        result.add_column(name.replace("_", " "), justify="right")
    for label, (key, write) in rows.items():
        values = [column.get(key) for column in columns.values()]
        result.add_row(label, *("" if value is None else write(value) for value in values))
    return result


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draws density by layer and by matrix type, and the runs' loss curves."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (layers, types, losses) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    by_layer = {k: v for k, v in summary["density_by_layer"].items() if k != "other"}
    layers.bar([int(layer) for layer in by_layer], by_layer.values())
    layers.set(title="mask density by layer", xlabel="layer", ylabel="share of weights changed")
    by_type = summary["density_by_matrix_type"]
    types.barh(list(by_type), list(by_type.values()))
    types.invert_yaxis()
    types.set(title="mask density by matrix type", xlabel="share of weights changed")
    for axes, line in ((layers, layers.axhline), (types, types.axvline)):
        line(summary["density"], color="black", linestyle=":", label="all weights")
        axes.legend()

    window = 5
    for name in RUNS:
        curve = torch.tensor(summary[name]["losses"])
        smooth = curve.unfold(0, min(window, len(curve)), 1).mean(1)
        steps = range(len(curve) - len(smooth) + 1, len(curve) + 1)
        style = "--" if name.startswith("masked") else "-"
        losses.plot(steps, smooth, style, label=name.replace("_", " "))
    losses.axhline(torch.tensor(2.0).log().item(), color="black", linestyle=":", label="ln 2")
    losses.set(title=f"DPO loss, mean of {window} steps", xlabel="step")
    losses.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    logging.disable_progress_bar()
    main()
