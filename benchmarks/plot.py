"""Draws the figures of README.md and docs/measurements.md from the files of results/.

    make readme

Only reads and draws. Each PNG carries, by name, the SHA-256 of every file of results it was drawn
from; `tests/test_readme.py` finds one that is older than its file. A benchmark that draws its own
figure draws it without: `make readme` draws it again.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import drawings

HERE = Path(__file__).parent
RESULTS, DRAWN = HERE / "results", HERE / "figures"


@dataclass(frozen=True)
class Figure:
    """A figure: the names of the files it shows, and what draws them to a path."""

    sources: tuple[str, ...]
    draw: Callable[..., None]


def main() -> None:
    """Draw every figure."""
    for name, figure in FIGURES.items():
        path = DRAWN / f"{name}.png"
        contents = [json.loads((RESULTS / source).read_text()) for source in figure.sources]
        figure.draw(*contents, path)
        stamp(path, digests(name))
        print(f"drew {path.relative_to(HERE.parent)}")


def digests(name: str) -> dict[str, str]:
    """Return the SHA-256 of each file that a figure shows, as they are now."""
    sources = FIGURES[name].sources
    return {
        source: hashlib.sha256((RESULTS / source).read_bytes()).hexdigest() for source in sources
    }


def stamp(path: Path, texts: dict[str, str]) -> None:
    """Write texts into a PNG; its pixels stay."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=info, dpi=image.info["dpi"], optimize=True)


def stamps(path: Path) -> dict[str, str]:
    """Return the texts of a PNG, without its drawing program's."""
    with Image.open(path) as image:
        return {key: text for key, text in image.text.items() if key != "Software"}


# Each of these is drawn by the script that measures it, and imports what that does; the others by
# `benchmarks.drawings`.


def quickstart(summary: dict[str, Any], path: Path) -> None:
    """The demo: density by layer and by matrix type, loss curves."""
    sys.path.append(str(HERE.parent / "examples"))
    from quickstart import draw

    draw(summary, path)


def rl_task(summary: dict[str, Any], path: Path) -> None:
    """GRPO on sums: training reward, and held-out accuracy by seed."""
    from benchmarks.rl_task_compare import draw

    draw(summary, path)


def small_state(summary: dict[str, Any], path: Path) -> None:
    """Small optimizer state: loss curves, and distances from 32-bit state."""
    from benchmarks.small_state_compare import draw

    draw(summary["variants"], summary["losses"], path)


FIGURES = {
    "quickstart": Figure(("quickstart.json",), quickstart),
    "rl_task": Figure(("rl_task.json",), rl_task),
    "small_state": Figure(("small_state.json",), small_state),
    "accuracy": Figure(("full_vs_masked_dpo.json", "full_vs_masked_quick.json"), drawings.accuracy),
    "memory": Figure(("memory_at_scale.json",), drawings.memory),
    "extract": Figure(("extract.json",), drawings.extract),
    "scaling": Figure(("scaling.json",), drawings.scaling),
}

if __name__ == "__main__":
    main()
