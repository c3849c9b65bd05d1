"""The pages are what their templates make of benchmarks/results, and hold no number besides."""

import re

import pytest
from jinja2 import UndefinedError

from benchmarks import plot, readme

# Numbers that a template may write itself, and what they are instead of a measurement.
ALLOWED = {
    "README.md.j2": {
        "An index takes 8 bytes (the kernels' own forms, 4 bytes": "torch's integers",
        "a mask of 5% has": "a setting",
        ", of 1% ": "a setting",
        "arXiv 2505.11711": "an identifier",
        "Python 3.11": "a version",
        "Licence: Apache-2.0": "a version",
        "ln 2 = 0.693": "a formula",
        "`--keep 0.05` takes the 5% of each parameter": "what the option means",
        "random 2%": "the default density",
        "at a density of 5% and": "a setting",
        "at 20%, on 2 cores": "a setting",
        "Density 1.0": "a setting",
    },
    "measurements.md.j2": {
        "and 8 bytes an index": "torch's int64",
        "[2502.01456](https://arxiv.org/abs/2502.01456)": "an identifier",
        "at 5% both": "a setting",
        "entries within 1%": "a setting",
        "random 2%": "a setting",
        "1.02 of the bare model's": "a target",
        "(5% of the linear layers)": "a setting",
        "at 20, 5 and 1%": "settings",
        "| | 20% | 5% | 1% |": "settings",
        "missed at 5% and, by little, at 1%;": "settings",
        "misses it at 5% too": "a setting",
        "95% interval": "a convention",
        "mean, 95% over seeds": "a convention",
        "an index takes 8 bytes": "torch's int64",
    },
}
# What is measured: a share, a count with a unit, anything with decimals.
UNIT = r"[kKMGT]i?B|bytes|ms|s|seconds|minutes|x|times|points|percent"
MEASURED = re.compile(rf"(?<![\w.-])\d[\d,]*(?:\.\d+|\s?%|(?:\.\d+)?\s?(?:{UNIT})\b)")
# Written by the template language, or no prose: code, the targets of links.
NOT_PROSE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|```.*?```|\]\(.*?\)|`[^`]*`", re.DOTALL)


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_are_their_templates_with_the_committed_results(page: str) -> None:
    assert (readme.ROOT / page).read_text() == readme.render(page), "run `make readme`"


@pytest.mark.parametrize("name", plot.FIGURES)
def test_figures_show_the_committed_results(name: str) -> None:
    path = plot.DRAWN / f"{name}.png"
    assert plot.stamps(path) == plot.digests(name), "run `make readme`"


def test_every_figure_is_drawn_and_shown() -> None:
    pages = "".join((readme.ROOT / page).read_text() for page in readme.PAGES)
    committed = {path.stem for path in plot.DRAWN.glob("*.png")}
    assert (
        committed == set(plot.FIGURES) == set(re.findall(r"benchmarks/figures/(\w+)\.png", pages))
    )


@pytest.mark.parametrize("template", readme.PAGES.values())
def test_templates_write_no_measured_number(template: str) -> None:
    assert written_numbers((readme.TEMPLATES / template).read_text(), ALLOWED[template]) == []


def test_a_number_in_prose_is_found() -> None:
    text = "takes 0.93 of it, {{ x }}% and `1.5`; 12 MB, 40 steps, 3x, v1.2; 5% by default"
    assert written_numbers(text, {"5% by default": ""}) == ["0.93", "12 MB", "3x"]
    with pytest.raises(AssertionError, match="no longer there"):
        written_numbers(text, {"6% by default": ""})


def written_numbers(text: str, allowed: dict[str, str]) -> list[str]:
    """Measured numbers in a template's prose, without those in an allowed phrase."""
    for phrase in allowed:
        assert phrase in text, f"allowed, but no longer there: {phrase}"
        text = text.replace(phrase, "")
    return MEASURED.findall(NOT_PROSE.sub("", text))


def test_a_missing_result_and_a_claim_that_fails_are_errors(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(readme, "TEMPLATES", tmp_path)
    template = tmp_path / readme.PAGES["README.md"]
    template.write_text("{{ optimizer.phase[0].ratio | fixed }}{{ holds(1 < 2) }}\n")
    assert re.fullmatch(r"\d\.\d\d\n", readme.render("README.md"))
    template.write_text("{{ optimizer.phase[0].ratios_of_old }}")
    with pytest.raises(UndefinedError):
        readme.render("README.md")
    for wrong in ('{{ optimizer.phase | pick(density=0.3, state="fp32") }}', "{{ holds(2 < 1) }}"):
        template.write_text(wrong)
        with pytest.raises(ValueError):
            readme.render("README.md")
