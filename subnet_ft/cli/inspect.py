"""`subnet-ft inspect`: what is in a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from subnet_ft.cli.output import JsonFlag, one_line_errors, percent, print_json, print_table

if TYPE_CHECKING:
    from subnet_ft.analysis.density import Density


@one_line_errors
def inspect(
    mask: Annotated[str, typer.Argument(help="Mask file, or adapter directory or file.")],
    as_json: JsonFlag = False,
) -> None:
    """Show a mask's density: overall, by layer, by matrix type, and its extremes."""
    from subnet_ft.analysis.density import (
        density_by,
        extremes,
        layer_of,
        matrix_type_of,
        overall_density,
    )
    from subnet_ft.checkpoints.adapter_mask import open_mask_or_adapter

    opened = open_mask_or_adapter(mask)
    densest, sparsest = extremes(opened)
    tables = {
        "overall": [overall_density(opened)],
        "by_layer": density_by(opened, layer_of),
        "by_matrix_type": density_by(opened, matrix_type_of),
        "densest": densest,
        "sparsest": sparsest,
    }
    if as_json:
        figures = {key: [entry.as_dict() for entry in table] for key, table in tables.items()}
        overall = figures.pop("overall")[0]
        print_json({"mask": mask, "metadata": dict(opened.metadata), "overall": overall, **figures})
        return
    if opened.metadata:
        print_table(mask, ("", "value"), opened.metadata.items())
    for key, table in tables.items():
        _print(key.replace("_", " "), table)


def _print(title: str, table: list[Density]) -> None:
    rules = list(table[0].changed) if table else []
    columns = ("", "in the mask", "of", "density", *rules)
    rows = [
        (
            entry.label,
            f"{entry.nnz:,}",
            f"{entry.numel:,}",
            percent(entry.density),
            *(percent(entry.changed[rule] / entry.numel) for rule in rules),
        )
        for entry in table
    ]
    print_table(title, columns, rows)
