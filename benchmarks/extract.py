"""How fast, and in how much memory, does extraction run against the paper's own script?

The baseline does what the script of arXiv 2505.11711 does: load both models in bf16 with
transformers, subtract, concatenate all deltas, count exact zeros and values within 1e-5 of zero.
Each run is a process of its own, imports included, in turn with the other; the median counts. The
run stops without a result where the counts of the two differ.

    python -m benchmarks.extract                       # a synthetic pair of 1.1 GB a side
    python -m benchmarks.extract --pair base tuned     # and a pair of yours
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "extract.json"
REPEATS = 3
BASELINE = """
import sys, torch
from transformers import AutoModelForCausalLM
base, tuned = (
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in sys.argv[1:3]
)
others = dict(tuned.named_parameters())
deltas = torch.cat([(others[n] - p).detach().view(-1) for n, p in base.named_parameters()])
exact = int((deltas == 0).sum())
within = int(torch.isclose(deltas, torch.zeros_like(deltas), atol=1e-5).sum())
print(deltas.numel() - exact, deltas.numel() - within, deltas.numel())
"""
# In a process of its own: a process starts with its parent's peak memory as its own.
SYNTHETIC = """
import json, sys
from pathlib import Path
from benchmarks.extract import write_synthetic_pair
write_synthetic_pair(Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""
OURS = "import sys; from subnet_ft.cli.main import app; app(sys.argv[1:])"


def measure(code: str, *arguments: object) -> dict[str, Any]:
    """Run Python code in its own process.

    Returns:
        `seconds`, `peak_bytes` (of resident memory) and `stdout`.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdout=stdout, stderr=stderr
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        if child.returncode:
            raise RuntimeError(stderr.read())
        return {
            "seconds": seconds,
            "peak_bytes": usage.ru_maxrss * 1024,
            "stdout": stdout.read(),
        }


def ours(base: Path, tuned: Path, folder: Path) -> dict[str, Any]:
    """Measure `subnet-ft extract`; adds `counts`: bitwise, beyond 1e-5, all."""
    output = folder / "mask.safetensors"
    result = measure(OURS, "extract", base, tuned, "-o", output, "--overwrite", "--json")
    printed = json.loads(result.pop("stdout"))
    changed = printed["changed"]
    return {**result, "counts": [changed["bitwise"], changed["abs:1e-5"], printed["numel"]]}


def baseline(base: Path, tuned: Path) -> dict[str, Any]:
    """Measure the equivalent of the paper's script; adds `counts` as `ours` does."""
    result = measure(BASELINE, base, tuned)
    return {**result, "counts": [int(word) for word in result.pop("stdout").split()]}


def compare(label: str, base: Path, tuned: Path, folder: Path) -> dict[str, Any]:
    """Run both in turn.

    Raises:
        RuntimeError: their counts differ.
    """
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "baseline": []}
    for _ in range(REPEATS):
        runs["ours"].append(ours(base, tuned, folder))
        runs["baseline"].append(baseline(base, tuned))
    counts = [run["counts"] for side in runs.values() for run in side]
    if any(count != counts[0] for count in counts):
        raise RuntimeError(f"{label}: counts differ: {counts}")
    row: dict[str, Any] = {"pair": label, "bytes_a_side": weight_bytes(base)}
    row["changed_bitwise"], row["changed_1e-5"], row["numel"] = counts[0]
    for side, results in runs.items():
        row[f"{side}_seconds"] = statistics.median(run["seconds"] for run in results)
        row[f"{side}_all_seconds"] = [run["seconds"] for run in results]
        row[f"{side}_peak_bytes"] = statistics.median(run["peak_bytes"] for run in results)
    row["times_faster"] = row["baseline_seconds"] / row["ours_seconds"]
    row["share_of_memory"] = row["ours_peak_bytes"] / row["baseline_peak_bytes"]
    return row


def growth(folder: Path) -> dict[str, Any]:
    """Measure our peak memory on a pair, on 16 times as many tensors, and on 16 times larger."""
    small = {"hidden": 1024, "layers": 2, "vocabulary": 8192}
    sizes = {
        "pair": small,
        "16 times the tensors": {"hidden": 1024, "layers": 32, "vocabulary": 131072},
        "16 times larger tensors": {"hidden": 4096, "layers": 2, "vocabulary": 32768},
    }
    peaks, weights = {}, {}
    for label, size in sizes.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            base, tuned = synthetic_pair(Path(place), **size)
            weights[label] = weight_bytes(base)
            runs = [ours(base, tuned, Path(place))["peak_bytes"] for _ in range(REPEATS)]
            peaks[label] = statistics.median(runs)
    return {"bytes_a_side": weights, "peak_bytes": peaks,
            "growth": max(peaks.values()) / peaks["pair"] - 1}  # fmt: skip


def synthetic_pair(folder: Path, **size: int) -> tuple[Path, Path]:
    """Make a pair of random checkpoints; see `write_synthetic_pair`."""
    measure(SYNTHETIC, folder, json.dumps(size))
    return folder / "base", folder / "tuned"


def write_synthetic_pair(
    folder: Path, hidden: int, layers: int, vocabulary: int, shard_layers: int = 8
) -> None:
    """Write two random Llama checkpoints in bf16 shards, 12% of their weights apart."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    inner = 4 * hidden
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden),
              "self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
              "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
              "post_attention_layernorm": (hidden,)}  # fmt: skip
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    ]
    for first in range(0, layers, shard_layers):
        shards.append(
            {
                f"model.layers.{layer}.{name}.weight": shape
                for layer in range(first, min(first + shard_layers, layers))
                for name, shape in shapes.items()
            }
        )
    sides = [folder / "base", folder / "tuned"]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
              "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
              "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
              "vocab_size": vocabulary, "tie_word_embeddings": True}  # fmt: skip
    weight_map = {}
    for side in sides:
        side.mkdir()
        (side / "config.json").write_text(json.dumps(config))
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        base, tuned = {}, {}
        for key, shape in shard.items():
            weight = torch.randn(shape, generator=generator).mul_(0.02)
            moved = torch.rand(shape, generator=generator) < 0.12
            base[key] = weight.bfloat16()
            tuned[key] = torch.where(moved, weight * 1.01, weight).bfloat16()
        for side, weights in zip(sides, (base, tuned), strict=True):
            save_file(weights, side / name, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    for side in sides:
        (side / "model.safetensors.index.json").write_text(index)


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weight files."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))


def machine() -> dict[str, Any]:
    """Return processor, cores and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def show(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="extraction against the paper's script (median of 3)")
    for column in ("pair", "GB a side", "ours, s", "script, s", "faster", "ours, MB", "script, MB",
                   "memory"):  # fmt: skip
        table.add_column(column, justify="left" if column == "pair" else "right")
    for row in results["pairs"]:
        table.add_row(
            row["pair"], f"{row['bytes_a_side'] / 1e9:.2f}", f"{row['ours_seconds']:.2f}",
            f"{row['baseline_seconds']:.2f}", f"{row['times_faster']:.1f}x",
            f"{row['ours_peak_bytes'] / 1e6:.0f}", f"{row['baseline_peak_bytes'] / 1e6:.0f}",
            f"1/{1 / row['share_of_memory']:.1f}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    for label, peak in results["growth"]["peak_bytes"].items():
        size = results["growth"]["bytes_a_side"][label]
        console.print(f"{label}: {size / 1e6:.0f} MB a side, peak {peak / 1e6:.0f} MB")
    console.print(f"growth of peak memory: {results['growth']['growth']:.1%}")


def main() -> None:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pair", nargs=2, type=Path, metavar=("BASE", "TUNED"))
    parser.add_argument("--label", default="given", help="what the given pair is called")
    arguments = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if arguments.pair:
            base, tuned = arguments.pair
            pairs.append(compare(arguments.label, base, tuned, folder))
        base, tuned = synthetic_pair(folder, hidden=1536, layers=16, vocabulary=32000)
        pairs.append(compare("synthetic", base, tuned, folder))
        small = folder / "small"
        small.mkdir()
        base, tuned = synthetic_pair(small, hidden=576, layers=25, vocabulary=49152)
        pairs.append(compare("synthetic, the size of SmolLM2-135M", base, tuned, folder))
        results = {"machine": machine(), "pairs": pairs, "growth": growth(folder)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
