"""How fast is extraction, and in what memory, against the paper's script and a plain read?

    python -m benchmarks.extract                            # pairs of 0.3, 1.3, 4 and 14 GB a side
    python -m benchmarks.extract --sizes 0.3                # some of them
    python -m benchmarks.extract --pair base tuned          # and a pair of yours, first

The pairs are Llamas in bf16 shards, the largest of Llama-2-7B's shapes; a random block, repeated,
fills them, and 12% of the tuned side differs. They need 28 GB of disk in all, one at a time.

The script's equivalent does what the script of arXiv 2505.11711 does: load both models in bf16 with
transformers, subtract, concatenate all deltas, count exact zeros and values within 1e-5 of zero. It
runs where its memory, by what it took at the size before, fits the machine; what is left out is
named with its reason. A plain read is one thread's, of all files, 16 MB at a time.

Each run is a process of its own, imports included, in turn with the others; the median counts.
"warm": the files are in the page cache, where both sides fit. "cold": they were dropped from it
before each run (a virtual machine's host may still hold them); what each process fetched from disk,
by the kernel's account, is beside its time. The measurement stops without a result where counts
differ: ours, the script's, and those the pair was made with.

Writes benchmarks/results/extract.json and prints tables.
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import fit, fits_table

RESULTS = Path(__file__).parent / "results" / "extract.json"
REPEATS = 3
CHANGED = 0.12
SHARD = 2_000_000_000
BLOCK = 1 << 24
ROOM = 0.85  # of the free memory
SCRIPT_RATIO = 10.0  # peak over a side's bytes until measured: models, differences, isclose's own
SIZES: dict[str, dict[str, Any]] = {
    "0.3": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "tie_word_embeddings": True},
    "1.3": {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 16,
            "num_attention_heads": 24, "num_key_value_heads": 24, "vocab_size": 32000,
            "tie_word_embeddings": True},
    "4": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 24,
          "num_attention_heads": 20, "num_key_value_heads": 20, "vocab_size": 32000,
          "tie_word_embeddings": False},
    "14": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
           "tie_word_embeddings": False},
}  # fmt: skip
SCRIPT = """
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
READ = """
import sys
from pathlib import Path
buffer = memoryview(bytearray(1 << 24))
for folder in sys.argv[1:]:
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
"""
OURS = "import sys; from subnet_ft.cli.main import app; app(sys.argv[1:])"
# In a process of its own: a process starts with its parent's peak memory as its own.
WRITE = """
import json, sys
from pathlib import Path
from transformers import LlamaConfig
from benchmarks.extract import write_pair
print(json.dumps(write_pair(Path(sys.argv[1]), LlamaConfig(**json.loads(sys.argv[2])))))
"""
Run = dict[str, Any]


def measure(code: str, *arguments: object) -> Run:
    """Run Python code in its own process.

    Returns:
        `seconds`, `peak_bytes` (of resident memory), `disk_bytes` (fetched from disk) and `stdout`.

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
            "disk_bytes": usage.ru_inblock * 512,
            "stdout": stdout.read(),
        }


def ours(base: Path, tuned: Path, folder: Path) -> Run:
    """Measure `subnet-ft extract`; adds `counts`: bitwise, beyond 1e-5, all."""
    output = folder / "mask.safetensors"
    result = measure(OURS, "extract", base, tuned, "-o", output, "--overwrite", "--json")
    printed = json.loads(result.pop("stdout"))
    changed = printed["changed"]
    return {**result, "counts": [changed["bitwise"], changed["abs:1e-5"], printed["numel"]]}


def script(base: Path, tuned: Path) -> Run:
    """Measure the equivalent of the paper's script; adds `counts` as `ours` does."""
    result = measure(SCRIPT, base, tuned)
    return {**result, "counts": [int(word) for word in result.pop("stdout").split()]}


def read(base: Path, tuned: Path) -> Run:
    """Measure a plain read of the files."""
    result = measure(READ, base, tuned)
    result.pop("stdout")
    return result


def drop_cache(*folders: Path) -> None:
    """Have the kernel forget the pages of the weight files."""
    for path in (file for folder in folders for file in weight_files(folder)):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # dirty pages stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(
    label: str,
    base: Path,
    tuned: Path,
    folder: Path,
    counts: list[int] | None = None,
    script_ratio: float = SCRIPT_RATIO,
    tell: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Measure one pair, warm and cold.

    Args:
        label: What the pair is called.
        base: The base's directory.
        tuned: The tuned side's.
        folder: Where the mask goes.
        counts: What the pair was made with, if known.
        script_ratio: The script's peak memory over a side's bytes, from what was measured before.
        tell: Told what runs.

    Raises:
        RuntimeError: counts differ.
    """
    size, free = weight_bytes(base), psutil.virtual_memory().available * ROOM
    both = size + weight_bytes(tuned)
    left_out = {}
    if both > free:
        left_out["warm"] = f"both sides are {both / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if script_ratio * size > free:
        left_out["script"] = (
            f"it takes about {script_ratio:.1f} times a side's bytes, here "
            f"{script_ratio * size / 1e9:.0f} GB; {free / 1e9:.1f} GB are free"
        )
    row: dict[str, Any] = {"pair": label, "bytes_a_side": size}
    row |= {"warm": None, "cold": None, "left_out": left_out}
    for cache in ("warm", "cold"):
        if cache in left_out:
            continue
        contestants: dict[str, Callable[[], Run]] = {
            "ours": lambda: ours(base, tuned, folder),
            "read": lambda: read(base, tuned),
        }
        if cache == "warm":
            read(base, tuned)
            if "script" not in left_out:
                contestants["script"] = lambda: script(base, tuned)
        runs: dict[str, list[Run]] = {name: [] for name in contestants}
        for repeat in range(REPEATS):
            for name, run in contestants.items():
                tell(f"{label}, {cache}, round {repeat + 1} of {REPEATS}: {name}")
                if cache == "cold":
                    drop_cache(base, tuned)
                runs[name].append(run())
        found = [run["counts"] for several in runs.values() for run in several if "counts" in run]
        counts = counts or found[0]
        if any(count != counts for count in found):
            raise RuntimeError(f"{label}: counts differ: {counts} and {found}")
        row[cache] = summary(runs)
    assert counts is not None
    return row | dict(zip(("changed_bitwise", "changed_1e-5", "numel"), counts, strict=True))


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Return medians, and the medians over rounds of the ratios of a round."""
    row: dict[str, Any] = {"script": None}
    for name, several in runs.items():
        row[name] = {
            key: statistics.median(run[key] for run in several)
            for key in ("seconds", "peak_bytes", "disk_bytes")
        } | {"all_seconds": [run["seconds"] for run in several]}

    def ratio(one: str, other: str, key: str) -> float | None:
        pairs = zip(runs.get(one, ()), runs.get(other, ()), strict=True)
        return statistics.median(a[key] / b[key] for a, b in pairs)

    row["ours_over_read"] = ratio("ours", "read", "seconds")
    known = "script" in runs
    row["script_over_ours"] = ratio("script", "ours", "seconds") if known else None
    row["script_memory_over_ours"] = ratio("script", "ours", "peak_bytes") if known else None
    return row


def write_pair(folder: Path, config: Any, changed: float = CHANGED) -> list[int]:
    """Write two checkpoints of a model's shapes in bf16 shards, as `base` and `tuned`.

    Args:
        folder: Where they go.
        config: Of a causal language model, from transformers.
        changed: Share of the tuned side's entries that are 1% larger, which is a step of bf16 or
            more.

    Returns:
        How many differ bitwise, and by more than 1e-5 as the paper's script counts; and all.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(BLOCK, generator=generator).mul_(0.02)
    moved = torch.rand(BLOCK, generator=generator) < changed
    blocks = {
        "base": weight.bfloat16(),
        "tuned": torch.where(moved, weight * 1.01, weight).bfloat16(),
    }
    delta = blocks["tuned"] - blocks["base"]
    within = torch.isclose(delta, torch.zeros_like(delta), atol=1e-5)
    differ = ((delta != 0).numpy(), (~within).numpy())
    in_block = [int(changes.sum()) for changes in differ]
    counts = [0, 0, 0]
    shards: list[list[str]] = [[]]
    room = SHARD
    for name, shape in shapes.items():
        whole, rest = divmod(shape.numel(), BLOCK)
        for i, changes in enumerate(differ):
            counts[i] += whole * in_block[i] + int(changes[:rest].sum())
        counts[2] += shape.numel()
        room -= 2 * shape.numel()
        if room < 0 and shards[-1]:
            shards.append([])
            room = SHARD - 2 * shape.numel()
        shards[-1].append(name)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    for side, block in blocks.items():
        config.save_pretrained(folder / side)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / side / "model.safetensors.index.json").write_text(index)
        for file, names in zip(files, shards, strict=True):
            tensors = {name: _filled(shapes[name], block) for name in names}
            save_file(tensors, folder / side / file, metadata={"format": "pt"})
    return counts


def _filled(shape: Any, block: Any) -> Any:
    """Return a tensor of this shape, filled with the block again and again."""
    count = shape.numel()
    if count > len(block):
        block = block.repeat(-(-count // len(block)))
    return block[:count].clone().view(shape)  # its own storage: files hold whole storages


def weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's weight files."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weight files."""
    return sum(p.stat().st_size for p in weight_files(folder))


def machine() -> dict[str, Any]:
    """Return processor, cores and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def growth(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how our peak memory grows from the smallest to the largest pair."""
    ends = [pick(pairs, key=lambda pair: pair["bytes_a_side"]) for pick in (min, max)]
    peaks = [pair["cold"]["ours"]["peak_bytes"] for pair in ends]
    return {
        "bytes_a_side": [pair["bytes_a_side"] for pair in ends],
        "peak_bytes": peaks,
        "growth": peaks[1] / peaks[0] - 1,
    }


def lines(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit time against bytes: a process starts, then everything is linear in what it reads."""
    fits = []
    for cache in ("warm", "cold"):
        for what in ("ours", "read", "script"):
            points = [
                (2 * pair["bytes_a_side"] / 1e9, pair[cache][what]["seconds"])
                for pair in pairs
                if pair[cache] and pair[cache][what]
            ]
            large = points[1:]  # the smallest is mostly the start of a process
            label, x = f"{what}, {cache}, seconds", "GB, both sides"
            if len(points) > 2:
                why = "a straight line: the start, then seconds a GB read"
                fits.append(fit(label, x, points, why=why))
            if len(large) > 2:
                why = (
                    "linear in bytes; without the smallest pair, which is mostly a process's start"
                )
                fits.append(fit(label, x, large, logarithmic=True, expected=1.0, why=why))
    return fits


def show(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"extraction (medians of {REPEATS}); s and MB of resident memory")
    for column in ("pair", "GB a side", "cache", "ours, s", "read, s", "script, s", "ours/read",
                   "script/ours", "ours, MB", "script, MB"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("pair", "cache") else "right")
    for pair in results["pairs"]:
        for cache in ("warm", "cold"):
            if (runs := pair[cache]) is None:
                continue
            theirs = runs["script"]
            table.add_row(
                pair["pair"], f"{pair['bytes_a_side'] / 1e9:.2f}", cache,
                f"{runs['ours']['seconds']:.2f}", f"{runs['read']['seconds']:.2f}",
                f"{theirs['seconds']:.1f}" if theirs else "",
                f"{runs['ours_over_read']:.2f}",
                f"{runs['script_over_ours']:.1f}" if theirs else "",
                f"{runs['ours']['peak_bytes'] / 1e6:.0f}",
                f"{theirs['peak_bytes'] / 1e6:.0f}" if theirs else "",
            )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    for pair in results["pairs"]:
        for what, why in pair["left_out"].items():
            console.print(f"{pair['pair']}, left out: {what}: {why}")
    console.print(fits_table(results["fits"]))
    console.print(f"growth of peak memory: {results['growth']['growth']:.1%}")


def main() -> None:
    """Measure, write the results, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="GB")
    parser.add_argument("--pair", nargs=2, type=Path, metavar=("BASE", "TUNED"))
    parser.add_argument("--label", default="given", help="what the given pair is called")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    pairs = []
    ratio = SCRIPT_RATIO
    with tempfile.TemporaryDirectory() as place:
        if arguments.pair:
            pairs.append(compare(arguments.label, *arguments.pair, Path(place)))
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            print(f"{size} GB: writing the pair")
            counts = json.loads(measure(WRITE, folder, json.dumps(SIZES[size]))["stdout"])
            base, tuned = folder / "base", folder / "tuned"
            pairs.append(compare(f"{size} GB", base, tuned, folder, counts, ratio))
        warm = pairs[-1]["warm"]
        if warm and warm["script"]:
            ratio = warm["script"]["peak_bytes"] / pairs[-1]["bytes_a_side"]
    results = {"machine": machine(), "pairs": pairs, "fits": lines(pairs), "growth": growth(pairs)}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
