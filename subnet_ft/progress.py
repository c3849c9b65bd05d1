"""A progress bar on stderr, for people: nothing is written where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, total: int, enabled: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar while the block runs.

    Args:
        description: what stands before the bar.
        total: amount of work, in any unit.
        enabled: whether the caller wants a bar.

    Yields:
        a function that takes the amount of work just done.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda amount: None
        return
    # Imported only where a bar is drawn: the import takes longer than small models do.
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
