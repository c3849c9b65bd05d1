"""The typer application behind `subnet-ft`."""

from __future__ import annotations

from typing import Annotated

import typer

from subnet_ft.cli.compare import compare
from subnet_ft.cli.extract import extract
from subnet_ft.cli.inspect import inspect
from subnet_ft.cli.merge import merge
from subnet_ft.cli.plan import plan
from subnet_ft.cli.train import train

app = typer.Typer(
    name="subnet-ft",
    help="Find the weights a finetuning run changed, and finetune only those.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from subnet_ft import __version__

        typer.echo(f"subnet-ft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find the weights a finetuning run changed, and finetune only those."""


app.command()(extract)
app.command()(inspect)
app.command()(compare)
app.command()(merge)
app.command()(plan)
app.add_typer(train, name="train")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
