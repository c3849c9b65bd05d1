"""`subnet-ft compare`: how much masks have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from subnet_ft.cli.output import JsonFlag, one_line_errors, percent, print_json, print_table


@one_line_errors
def compare(
    masks: Annotated[list[str], typer.Argument(help="Two or more mask files or adapters.")],
    as_json: JsonFlag = False,
) -> None:
    """Show pairwise overlap beside the chance level and the ceiling."""
    from subnet_ft.analysis.overlap import pairwise_overlap
    from subnet_ft.checkpoints.adapter_mask import open_mask_or_adapter

    opened = {path: open_mask_or_adapter(path) for path in masks}
    overlaps = pairwise_overlap(opened)
    if as_json:
        sizes = [
            {"mask": path, "nnz": mask.nnz, "numel": mask.numel, "density": mask.density}
            for path, mask in opened.items()
        ]
        pairs = [{"a": a, "b": b, **pair.as_dict()} for (a, b), pair in overlaps.items()]
        print_json({"masks": sizes, "pairs": pairs})
        return
    print_table(
        "Masks",
        ("mask", "weights", "density"),
        [(path, f"{mask.nnz:,}", percent(mask.density)) for path, mask in opened.items()],
    )
    for (a, b), pair in overlaps.items():
        o1 = (pair.o1, pair.chance_o1, pair.uniform_o1, pair.ceiling_o1)
        o2 = (pair.o2, pair.chance_o2, pair.uniform_o2, pair.ceiling_o2)
        print_table(
            f"A = {a}, B = {b}",
            ("", "found", "chance", "chance, uniform", "ceiling"),
            [
                ("o1, share of A in B", *map(percent, o1)),
                ("o2, share of B in A", *map(percent, o2)),
                ("Jaccard", percent(pair.jaccard), percent(pair.chance_jaccard), "", ""),
                ("lift: found / chance", "", f"{pair.lift:.2f}", f"{pair.uniform_lift:.2f}", ""),
            ],
        )
