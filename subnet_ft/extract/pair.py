"""Two checkpoints side by side, in chunks that are read and compared in threads."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from subnet_ft.checkpoints import Checkpoint
from subnet_ft.errors import CheckpointError
from subnet_ft.storage.arrays import array_dtype
from subnet_ft.storage.lazy import torch

WORKERS = 2
T = TypeVar("T")


class Pair:
    """A base and what became of it: the same parameters, in chunks.

    Args:
        base: checkpoint the run started from.
        tuned: checkpoint it ended with.
        chunk: elements read at a time; bounds the memory.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, chunk: int) -> None:
        """Remember both."""
        self.base, self.tuned, self.chunk = base, tuned, chunk

    def numel(self, name: str) -> int:
        """Return the size of a parameter."""
        return self.base.tensors[name].numel

    def dtypes(self, name: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Return the dtypes of a parameter's arrays, the base's and the tuned one's."""
        base, tuned = (side.tensors[name].dtype for side in (self.base, self.tuned))
        return array_dtype(base), array_dtype(tuned)

    def chunks(self, name: str) -> range:
        """Return where the chunks of a parameter begin."""
        return range(0, self.numel(name), self.chunk)

    def compare(
        self, names: Sequence[str], comparison: Callable[[str, np.ndarray, np.ndarray], T]
    ) -> Generator[tuple[int, T], None, None]:
        """Yield (elements, result) of every chunk, in order.

        Args:
            names: parameters, in the order wanted.
            comparison: takes a name and a chunk of each side, (elements,) as `storage.arrays`
                holds them; called in threads.

        Raises:
            CheckpointError: names the parameter that cannot be read or compared.
        """
        buffers: SimpleQueue[np.ndarray] = SimpleQueue()
        for _ in range(WORKERS):
            buffers.put(np.empty((2, self.chunk * 8), np.uint8))

        def work(name: str, start: int, stop: int) -> tuple[int, T]:
            memory = buffers.get()
            try:
                sides = zip((self.base, self.tuned), memory, self.dtypes(name), strict=True)
                ours, theirs = (
                    side.read_array(name, start, stop, out=bytes_.view(dtype))
                    for side, bytes_, dtype in sides
                )
                return stop - start, comparison(name, ours, theirs)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from error
            finally:
                buffers.put(memory)

        pending: deque[Future[tuple[int, T]]] = deque()
        with one_torch_thread(), ThreadPoolExecutor(WORKERS) as pool:
            try:
                for name in names:
                    for start in self.chunks(name):
                        if len(pending) > WORKERS:
                            yield pending.popleft().result()
                        stop = min(start + self.chunk, self.numel(name))
                        pending.append(pool.submit(work, name, start, stop))
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch's operations on one thread each: here the chunks run side by side instead.

    Threads that wait for each other in every small operation cost more than they save, many times
    more where the machine is busy. Torch is there only where an adapter is laid over its base.
    """
    if "torch" not in sys.modules:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
