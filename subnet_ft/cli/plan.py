"""`subnet-ft plan`: what training needs in memory, before a GPU is rented."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from subnet_ft.cli.output import JsonFlag, one_line_errors, print_json, print_table
from subnet_ft.progress import progress_bar

if TYPE_CHECKING:
    from subnet_ft.plan.comparison import Row


@one_line_errors
def plan(
    model: Annotated[
        str, typer.Argument(help="A preset (Qwen3-8B, Llama-3.1-8B, ...), directory or hub id.")
    ],
    algo: Annotated[str, typer.Option(help="sft, dpo or grpo.")] = "sft",
    density: Annotated[float, typer.Option(help="Share of each linear layer to train.")] = 0.02,
    gpu: Annotated[float, typer.Option(help="The GPU's memory, GiB.")] = 24,
    batch: Annotated[
        int, typer.Option(help="Sequences, of DPO pairs, of GRPO completions, a device.")
    ] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a row, prompt and completion.")] = 1024,
    reference: Annotated[
        bool | None,
        typer.Option(help="A reference model's pass in each step; by default DPO has one."),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Recompute each layer in backward (gradient checkpointing).")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Trace a training step without weights or a GPU: its memory, and the densest mask that fits.

    The real code runs on tensors that have a shape and no memory. LoRA and full finetuning are
    traced alike, and often need less.
    """
    from subnet_ft.plan import comparison
    from subnet_ft.plan.models import load_config
    from subnet_ft.plan.search import budget
    from subnet_ft.plan.steps import Setting

    asked = algo == "dpo" if reference is None else reference
    setting = Setting(algo, batch, length, asked, checkpointing)
    budget(gpu)
    methods = (*comparison.masked(density), *comparison.RIVALS)
    config = load_config(model)
    with (
        warnings.catch_warnings(action="ignore"),
        progress_bar("tracing", len(methods) + 2, not as_json) as advance,
    ):
        rows: list[Row] = []
        for method in methods:
            rows += comparison.rows(config, method, setting)
            advance(1)
        fits = []
        for method in comparison.masked(density):
            fits += comparison.densest(config, method, setting, [gpu], rows)
            advance(1)
    said = comparison.sentence(gpu, fits, rows)
    if as_json:
        print_json(
            {
                "model": model,
                "gpu_gib": gpu,
                "usable_bytes": budget(gpu),
                "assumptions": comparison.ASSUMPTIONS,
                "rows": [row.as_dict() | {"fits": row.fits(gpu)} for row in rows],
                "largest_density": [fit.as_dict() for fit in fits],
                "sentence": said,
            }
        )
        return
    title = f"{model}, {algo}, batch {batch}, {length} tokens; GiB at the peak of a step"
    print_table(title, COLUMNS, [_cells(row, gpu) for row in rows])
    typer.echo(said)
    typer.echo(f"Assumed: {'; '.join(comparison.ASSUMPTIONS)}.")


COLUMNS = (
    "",
    "reference",
    "weights",
    "trained, index",
    "optimizer",
    "gradients",
    "activations",
    "peak",
    "fits",
)


def _cells(row: Row, gpu: float) -> tuple[str, ...]:
    parts = row.footprint.parts()
    sums = (
        parts["weights"] + parts["reference"],
        parts["values"] + parts["indices"] + parts["originals"],
        parts["optimizer"],
        parts["gradients"],
        parts["activations"] + parts["kv_cache"],
        row.footprint.peak,
    )
    figures = (f"{amount / 2**30:.1f}" for amount in sums)
    return (row.method.name, row.reference, *figures, "yes" if row.fits(gpu) else "no")
