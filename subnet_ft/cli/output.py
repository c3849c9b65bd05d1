"""What every subcommand does alike: errors on one line, tables for people, JSON for programs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from subnet_ft.errors import SubnetError

P = ParamSpec("P")
R = TypeVar("R")
BAD_INPUT = 2

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn bad input into one line on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (SubnetError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(BAD_INPUT) from error

    return wrapped


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout; the first column to the left, figures to the right."""
    # Imported here: with --json nothing of it is needed.
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    # Redirected output has no width; rich would assume 80 columns and fold.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def percent(share: float) -> str:
    """Format a share as a percentage with two decimals or two significant digits."""
    return f"{share:.2%}" if share == 0 or share >= 1e-4 else f"{share * 100:.2g}%"
