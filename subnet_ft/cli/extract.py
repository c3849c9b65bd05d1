"""`subnet-ft extract`: a prior run -> mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subnet_ft.cli.output import JsonFlag, one_line_errors, percent, print_json, print_table


@one_line_errors
def extract(
    base: Annotated[str, typer.Argument(help="Checkpoint the run started from.")],
    tuned: Annotated[str, typer.Argument(help="Checkpoint, or adapter, it ended with.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask file to write.")],
    rule: Annotated[str, typer.Option(help="bitwise, or abs:X.")] = "bitwise",
    keep: Annotated[
        float | None,
        typer.Option(
            help="Instead of a rule: the largest changes, up to this share of every parameter; "
            "for a LoRA and other runs that change everything."
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Regular expression on whole parameter names.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Regular expression of parameters to leave out.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Extract the mask of the weights a run changed."""
    from subnet_ft.analysis.density import overall_density
    from subnet_ft.extract import extract_mask

    mask = extract_mask(
        base,
        tuned,
        rule,
        keep=keep,
        output=output,
        overwrite=overwrite,
        include=include or None,
        exclude=exclude or None,
        progress=not as_json,
    )
    total = overall_density(mask)
    if as_json:
        print_json(
            {
                "mask": str(output),
                **mask.metadata,
                "parameters": len(mask.shapes),
                "nnz": mask.nnz,
                "numel": mask.numel,
                "density": mask.density,
                "changed": total.changed,
            }
        )
        return
    rows = [
        *mask.metadata.items(),
        ("parameters", len(mask.shapes)),
        ("weights in the mask", f"{mask.nnz:,} of {mask.numel:,}"),
        ("density", percent(mask.density)),
        *((f"changed, {name}", percent(n / mask.numel)) for name, n in total.changed.items()),
        ("file", f"{output} ({output.stat().st_size:,} bytes)"),
    ]
    print_table("Extracted mask", ("", "value"), rows)
