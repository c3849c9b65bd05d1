"""`subnet-ft merge`: base + adapter -> an ordinary model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subnet_ft.cli.output import JsonFlag, one_line_errors, print_json, print_table


@one_line_errors
def merge(
    base: Annotated[str, typer.Argument(help="The model the adapter was trained on.")],
    adapter: Annotated[str, typer.Argument(help="Adapter directory, ours or LoRA.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to make.")],
    as_json: JsonFlag = False,
) -> None:
    """Merge an adapter into its base, in the base's dtype."""
    from subnet_ft.merge import merge_checkpoint

    summary = merge_checkpoint(base, adapter, output, progress=not as_json)
    figures = {**summary._asdict(), "output": str(summary.output), "files": list(summary.files)}
    if as_json:
        print_json(figures)
        return
    figures["files"] = ", ".join(summary.files)
    figures["bytes"] = f"{summary.bytes:,}"
    print_table("Merged model", ("", "value"), figures.items())
