"""What `benchmarks.plot` draws itself: each function turns parsed results into one PNG."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")
MARKERS = {"full": "s", "masked": "o", "rival": "^"}
SIDES = {"full": "C0", "masked": "C1"}
GIB = 2**30
Row = Mapping[str, Any]


def save(figure: Figure, path: Path) -> None:
    """Write the PNG."""
    figure.savefig(path, dpi=120)
    plt.close(figure)


def accuracy(*reports_and_path: Any) -> None:
    """Held-out figures against trainable parameters; a panel for each `full_vs_masked` report."""
    *reports, path = reports_and_path
    figure, panels = plt.subplots(
        1, len(reports), figsize=(6 * len(reports) + 2.5, 4.5), squeeze=False, layout="constrained"
    )
    names = dict.fromkeys(row["method"] for report in reports for row in report["learning"])
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for panel, report in zip(panels[0], reports, strict=True):
        _learned(panel, report, colours)
    labelled = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels[0])
    legend = {label: handle for found in labelled for handle, label in found}
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize=8)
    save(figure, path)


def _learned(panel: Axes, report: Row, colours: Mapping[str, str]) -> None:
    """Draw one report: a point a method, its seeds' range; hollow where the rate is an edge."""
    rows = sorted(report["learning"], key=lambda row: row["trainable"])
    for row, x in zip(rows, _set_apart([row["trainable"] for row in rows]), strict=True):
        found, colour = row["heldout"], colours[row["method"]]
        panel.errorbar(
            x,
            mean(found),
            yerr=[[mean(found) - min(found)], [max(found) - mean(found)]],
            fmt=MARKERS[row["group"]],
            capsize=3,
            color=colour,
            markerfacecolor="none" if row["edge"] else colour,
            label=row["method"],
        )
    if report["heldout_before"] is not None:
        panel.axhline(report["heldout_before"], color="black", linewidth=0.8, label="before")
    if report["heldout_kind"].startswith("share of held-out pairs"):
        panel.axhline(0.5, color="black", linestyle=":", linewidth=0.8, label="chance")
    settings = report["settings"]
    panel.set(
        xscale="log",
        xlabel="trainable parameters (equal counts set apart)",
        ylabel=report["heldout_kind"],
        title=f"{settings['algo'].upper()}, {settings['model']}; mean and range of seeds",
    )


def _set_apart(counts: Iterable[float]) -> list[float]:
    """Move counts that would lie on one another, rising ones to the right."""
    moved: list[float] = []
    for count in counts:
        moved.append(max(count, moved[-1] * 1.07) if moved else count)
    return moved


def scaling(results: Row, path: Path) -> None:
    """Step time, masked and full, and bytes, as the model, the density and the length grow."""
    figure, (times, bytes_) = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    sweeps = {"size": "parameters", "density": "density", "length": "length"}
    for panel, (sweep, x) in zip(times, sweeps.items(), strict=True):
        rows = results[sweep]
        for side, colour in SIDES.items():
            panel.plot(*_points(rows, x, side, "step_ms"), "o-", color=colour, label=side)
        for row in rows:
            if row["masked"]["ratio"] is not None:
                at = (row[x], row["masked"]["step_ms"])
                text = f"{row['masked']['ratio']:.2f}"
                panel.annotate(
                    text, at, xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8
                )
        panel.set(ylabel="ms a step; masked / full below")
    size, density, length = bytes_
    for panel, sweep in ((size, "size"), (length, "length")):
        for side, colour in SIDES.items():
            for key, style in (("state_bytes", "o-"), ("peak_bytes", "o:")):
                points = _points(results[sweep], sweeps[sweep], side, key)
                label = f"{side}, {key.removesuffix('_bytes')}"
                panel.plot(*points, style, color=colour, label=label)
    parts = {
        "state_bytes": "state",
        "file_bytes": "adapter file",
        "sync_bytes": "first sync",
        "sync_values_bytes": "later sync",
    }
    for i, (key, label) in enumerate(parts.items(), start=1):
        points = _points(results["density"], "density", "masked", key)
        density.plot(*points, "o-", color=f"C{i}", label=label)
    whole = results["density"][0]
    density.axhline(whole["full"]["state_bytes"], color="C0", label="full: state")
    density.axhline(2 * whole["parameters"], color="C0", linestyle=":", label="full: sync")
    share = f"masked at {results['density_elsewhere']:.0%}"
    titles = (f"Model size, {share}", f"Density, {whole['model']}", f"Length of one row, {share}")
    for column, (title, x) in enumerate(zip(titles, sweeps.values(), strict=True)):
        times[column].set(title=title)
        for panel in (times[column], bytes_[column]):
            panel.set(yscale="log", xlabel=x)
            panel.set_xscale("log", base=2 if x == "length" else 10)
            panel.margins(y=0.15)
            panel.legend(fontsize=8)
        bytes_[column].set(ylabel="bytes")
    save(figure, path)


def _points(rows: Sequence[Row], x: str, side: str, key: str) -> tuple[list[Any], list[Any]]:
    """Where a side was measured: its figures against x."""
    there = [row for row in rows if row[side]]
    return [row[x] for row in there], [row[side][key] for row in there]


def extract(results: Row, path: Path) -> None:
    """Extraction: time and peak memory against a side's size, with the script and a plain read."""
    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = {"ours": "subnet-ft extract", "script": "the paper's script", "read": "a plain read"}
    for i, (who, name) in enumerate(names.items()):
        for cache, style in (("warm", "o-"), ("cold", "o:")):
            rows = [row for row in results["pairs"] if row[cache] and row[cache][who]]
            if not rows:
                continue
            sizes = [row["bytes_a_side"] / 1e9 for row in rows]
            for panel, key, unit in ((seconds, "seconds", 1), (memory, "peak_bytes", 1e9)):
                values = [row[cache][who][key] / unit for row in rows]
                panel.plot(sizes, values, style, color=f"C{i}", label=f"{name}, {cache}")
    seconds.set(ylabel="seconds")
    memory.set(ylabel="peak memory, GB")
    for panel in (seconds, memory):
        panel.set(xscale="log", yscale="log", xlabel="GB a side")
        panel.legend(fontsize=8)
    save(figure, path)


PARTS = {
    "weights": "weights",
    "reference": "reference model",
    "values": "values, LoRA's matrices",
    "indices": "indices",
    "originals": "originals",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "kv_cache": "KV cache",
    "activations": "activations",
}


def memory(results: Row, path: Path) -> None:
    """A step of DPO on an 8B at its peak, by what it is; lines at what GPUs leave for it."""
    of = {"model": "Qwen3-8B", "algorithm": "dpo"}
    rows = [row for row in results["rows"] if of.items() <= row.items()]
    rows.sort(key=lambda row: row["peak_bytes"])
    precomputed = ", reference precomputed"
    names = [f"{r['method']}{precomputed * (r['reference'] == 'precomputed')}" for r in rows]
    figure, panel = plt.subplots(figsize=(12, 0.33 * len(rows) + 1.8), layout="constrained")
    end = [0.0] * len(rows)
    for i, (part, label) in enumerate(PARTS.items()):
        widths = [row["bytes"][part] / GIB for row in rows]
        if any(widths):
            panel.barh(names, widths, left=end, color=f"C{i}", label=label)
            end = [a + b for a, b in zip(end, widths, strict=True)]
    for gpu, usable in results["usable_bytes"].items():
        panel.axvline(usable / GIB, color="black", linestyle="--", linewidth=0.8)
        panel.annotate(
            f"{gpu} GB",
            (usable / GIB, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
        )
    panel.invert_yaxis()
    panel.set(
        xlabel=f"GiB at the peak of a step of DPO: {of['model']}, {rows[0]['batch']} pair of "
        f"{rows[0]['length']} tokens a row; dashed: what a GPU leaves for it"
    )
    panel.legend(fontsize=8, loc="upper right")
    save(figure, path)
