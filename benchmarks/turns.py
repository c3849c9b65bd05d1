"""Processes that take turns, a step each: what one is compared with ran a moment before it.

A shared machine's pace drifts over minutes: of two runs one after the other a ratio then says
little. Processes, not threads, so that each one's memory is its own.
"""

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress


class Turn:
    """A child's side: it says on stdout that it waits, and is told on stdin to go on.

    What it or a library prints from then on goes to stderr.
    """

    def __init__(self) -> None:
        self._told = os.dup(0)
        self._says = os.dup(1)
        os.dup2(2, 1)

    def wait(self) -> None:
        """End the turn there was, and wait for the next.

        Raises:
            SystemExit: The parent is gone.
        """
        os.write(self._says, b".")
        if not os.read(self._told, 1):
            raise SystemExit("expected a turn, found that whoever gives them has gone")


def take_turns(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Wait until all children wait, then let each in turn go on until it waits again or has ended.

    Args:
        children: With stdin and stdout piped and unbuffered.
    """
    waiting = [child for child in children if waits(child)]
    while waiting:
        for child in list(waiting):
            with suppress(BrokenPipeError):  # it was killed meanwhile
                child.stdin.write(b".")  # type: ignore[union-attr]
            if not waits(child):
                waiting.remove(child)


def waits(child: "subprocess.Popen[bytes]") -> bool:
    """Block until a child waits, which is true, or has ended."""
    return bool(child.stdout.read(1))  # type: ignore[union-attr]
