"""Writes README.md and docs/measurements.md from their templates and the files of results/.

    make readme

A template under docs/templates sees every benchmarks/results/<name>.json as the variable `<name>`
and writes no measured number itself. What a page says beside its numbers ("not faster") it can have
checked by `holds(...)`. A missing key, a row that is not there and a claim that does not hold fail.
`tests/test_readme.py` renders both pages and compares.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "docs" / "templates"
PAGES = {"README.md": "README.md.j2", "docs/measurements.md": "measurements.md.j2"}


def main() -> None:
    """Write every page."""
    for page in PAGES:
        (ROOT / page).write_text(render(page))
        print(f"wrote {page}")


def render(page: str) -> str:
    """Return the text of a page, one of `PAGES`.

    Raises:
        jinja2.UndefinedError: The template names a key that no file of results has.
        ValueError: A row is missing or there are several, or a claim does not hold.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    environment.globals["holds"] = holds
    return environment.get_template(PAGES[page]).render(results())


def results() -> dict[str, Any]:
    """Return the parsed files of benchmarks/results by name."""
    paths = (ROOT / "benchmarks" / "results").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in paths}


def holds(claim: bool) -> str:
    """Return nothing where a claim beside the numbers is true.

    Raises:
        ValueError: It is false: the text and the numbers disagree.
    """
    if not claim:
        raise ValueError("a claim in the text no longer holds; change the text")
    return ""


def pick(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """Return the one row that has these values.

    Raises:
        ValueError: None has, or several have.
    """
    found = [row for row in rows if all(row.get(key) == wanted[key] for key in wanted)]
    if len(found) != 1:
        raise ValueError(f"expected one row with {wanted}, found {len(found)}")
    return found[0]


def fixed(value: float, digits: int = 2) -> str:
    """0.4042 as 0.40, 1234.5 to no digits as 1,234."""
    return f"{value:,.{digits}f}"


def share(value: float, digits: int = 0) -> str:
    """0.8685 as 87%, or to one digit as 86.9%."""
    return f"{value:.{digits}%}"


def points(value: float, digits: int = 0) -> str:
    """0.8685 as 87, the number of a percentage."""
    return share(value, digits).removesuffix("%")


def mega(value: float, digits: int = 0) -> str:
    """Bytes in MB, or entries in millions."""
    return fixed(value / 1e6, digits)


def giga(value: float, digits: int = 2) -> str:
    """Bytes in GB, or entries in thousand millions."""
    return fixed(value / 1e9, digits)


def gibi(value: float, digits: int = 1) -> str:
    """Bytes in GiB, in which GPUs are sold."""
    return fixed(value / 2**30, digits)


def rate(value: float, digits: int = 6) -> str:
    """A learning rate: 3e-05 as 3e-5."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def mean_distance(values: Iterable[float]) -> float:
    """The mean of absolute values."""
    return statistics.mean(abs(value) for value in values)


FILTERS = {
    "pick": pick,
    "fixed": fixed,
    "share": share,
    "points": points,
    "mega": mega,
    "giga": giga,
    "gibi": gibi,
    "rate": rate,
    "mean": statistics.mean,
    "median": statistics.median,
    "stdev": statistics.stdev,
    "mean_distance": mean_distance,
}

if __name__ == "__main__":
    main()
