"""A prior run -> its mask: which weights of the base did it change?

Both checkpoints stream past in chunks, read and compared in two threads, straight into the mask
file. Memory is bounded by the chunk whatever the model's size.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from subnet_ft.checkpoints import Checkpoint, open_checkpoint, read_json
from subnet_ft.errors import CheckpointError, ConfigError, MaskMismatchError
from subnet_ft.extract.index_stream import IndexStream
from subnet_ft.extract.rules import PAPER_RULE, Changes, Rule, comparison_dtype
from subnet_ft.mask import SubnetMask
from subnet_ft.mask_file import file_metadata, header_bound, open_mask, storage_order
from subnet_ft.names import Patterns, select_names
from subnet_ft.progress import progress_bar
from subnet_ft.storage.arrays import array_dtype
from subnet_ft.storage.codec import Checksum
from subnet_ft.storage.lazy import torch
from subnet_ft.storage.safetensors_writer import SafetensorsWriter, check_target

_CHUNK = 1 << 20
_WORKERS = 2


def extract_mask(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    rule: str = "bitwise",
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
    progress: bool = True,
    chunk: int = _CHUNK,
) -> SubnetMask:
    """Extract the mask of the weights a run changed.

    Args:
        base: checkpoint the run started from: directory, weight file, or hub id.
        tuned: checkpoint it ended with; may be a PEFT adapter directory, laid over `base`.
        rule: "bitwise", or "abs:X" (the paper's is "abs:1e-5").
        output: mask file to write; None for a temporary one that goes with the mask.
        overwrite: whether an existing output is replaced.
        include: regular expressions on whole parameter names; None for all.
        exclude: regular expressions of parameters to leave out.
        progress: whether a terminal gets a progress bar.
        chunk: weights compared at a time, a multiple of 8; bounds the memory.

    Returns:
        A lazy view of the file.

    Raises:
        CheckpointError: a checkpoint is damaged, or the two are not of one model.
        ConfigError: an unknown rule, a pattern that matches nothing, an existing output.
        MaskMismatchError: no weight changed.
        UnsupportedError: quantized weights or an adapter that cannot be merged.

    Example:
        >>> mask = extract_mask("base", "tuned", output="mask.safetensors")  # doctest: +SKIP
        >>> mask.density  # doctest: +SKIP
        0.119

    Source: arXiv 2505.11711, section 2.2.
    """
    parsed = Rule.parse(rule)
    if chunk < 8 or chunk % 8:
        raise ConfigError(f"chunk must be a positive multiple of 8, got {chunk}; use {_CHUNK}.")
    if output is not None:
        check_target(Path(output), overwrite)
    before = open_checkpoint(base)
    after = open_checkpoint(tuned, base=before)
    check_pair(before, after)
    names = select_names(before.tensors, include, exclude)
    if output is not None:
        _stream(before, after, parsed, names, Path(output), overwrite, progress, chunk)
        return open_mask(output)
    handle, name = tempfile.mkstemp(suffix=".safetensors", prefix="subnet_mask_")
    os.close(handle)
    try:
        _stream(before, after, parsed, names, Path(name), True, progress, chunk)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return open_mask(name, temporary=True)


def check_pair(base: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse two checkpoints that do not have the same parameters.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    for name in [*base.tensors, *tuned.tensors]:
        left, right = base.tensors.get(name), tuned.tensors.get(name)
        if left is None or right is None:
            lacking, having = (base, tuned) if left is None else (tuned, base)
            reason = lacking.skipped.get(name)
            if name in lacking.aliases:
                reason = f"tied to {lacking.aliases[name]}"
            raise CheckpointError(
                f"{name}: expected in both checkpoints, {lacking.source} lacks it"
                f"{f' ({reason})' if reason else ''}, {having.source} has it; "
                "compare checkpoints of one model."
            )
        if left.shape != right.shape:
            raise CheckpointError(
                f"{name}: expected one shape, got {left.shape} in {base.source} and {right.shape} "
                f"in {tuned.source}; compare checkpoints of one model, before its embeddings are "
                "resized."
            )


def _stream(
    base: Checkpoint,
    tuned: Checkpoint,
    rule: Rule,
    names: Sequence[str],
    output: Path,
    overwrite: bool,
    progress: bool,
    chunk: int,
) -> None:
    """Write the mask file."""
    shapes = {name: base.tensors[name].shape for name in names}
    order = storage_order(shapes)
    metadata = _metadata(base, tuned, rule, names)
    widest = {name: _record(shapes[name], 10**18, "0" * 16, 10**18, 10**18) for name in names}
    reserve = header_bound(names, file_metadata(metadata, widest))
    total = sum(base.tensors[name].numel for name in names)
    records: dict[str, Any] = {}
    with (
        SafetensorsWriter(output, reserve, overwrite=overwrite) as writer,
        tempfile.TemporaryFile(dir=output.absolute().parent) as scratch,
        progress_bar("extract", total, progress) as advance,
        closing(_changes(base, tuned, rule, order, chunk)) as chunks,
    ):
        for name in order:
            stream = IndexStream(writer, scratch, name, base.tensors[name].numel)
            checksum = Checksum()
            bitwise = paper = 0
            for start in range(0, stream.numel, chunk):
                elements, changes = next(chunks)
                stream.add(changes.bits, changes.where, start)
                checksum.update(changes.values)
                bitwise += changes.bitwise
                paper += changes.paper
                advance(elements)
            stream.finish()
            hexdigest = checksum.hexdigest() if stream.nnz else None
            records[name] = _record(shapes[name], stream.nnz, hexdigest, bitwise, paper)
        _check_changed(records, base, tuned, rule)
        # In the model's order, whatever the order of storage.
        writer.metadata = file_metadata(metadata, {name: records[name] for name in names})


def _changes(
    base: Checkpoint, tuned: Checkpoint, rule: Rule, names: Sequence[str], chunk: int
) -> Generator[tuple[int, Changes], None, None]:
    """Yield (elements, changes) chunk by chunk, read and compared in threads, in order."""
    buffers: SimpleQueue[np.ndarray] = SimpleQueue()
    for _ in range(_WORKERS):
        buffers.put(np.empty((2, chunk * 8), np.uint8))

    def compare(name: str, start: int, stop: int) -> tuple[int, Changes]:
        memory = buffers.get()
        try:
            ours, theirs = (
                side.read_array(name, start, stop, out=bytes_.view(_dtype(side, name)))
                for side, bytes_ in zip((base, tuned), memory, strict=True)
            )
            return stop - start, rule.changes(ours, theirs)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        finally:
            buffers.put(memory)

    pending: deque[Future[tuple[int, Changes]]] = deque()
    with one_torch_thread(), ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for name in names:
                numel = base.tensors[name].numel
                for start in range(0, numel, chunk):
                    if len(pending) > _WORKERS:
                        yield pending.popleft().result()
                    pending.append(pool.submit(compare, name, start, min(start + chunk, numel)))
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


def _dtype(checkpoint: Checkpoint, name: str) -> np.dtype[Any]:
    return array_dtype(checkpoint.tensors[name].dtype)


def _record(
    shape: Sequence[int], nnz: int, checksum: str | None, bitwise: int, paper: int
) -> dict[str, Any]:
    record: dict[str, Any] = {"shape": list(shape), "nnz": nnz}
    if checksum:
        record["checksum"] = checksum
    record["changed"] = {"bitwise": bitwise, PAPER_RULE: paper}
    return record


def _metadata(
    base: Checkpoint, tuned: Checkpoint, rule: Rule, names: Sequence[str]
) -> dict[str, str]:
    """Say where the mask comes from, with the run's steps and peak learning rate where known."""
    stored = {tuned.tensors[n].dtype for n in names}
    compared = {comparison_dtype(_dtype(base, n), _dtype(tuned, n)) for n in names}
    metadata = {
        "base_model": base.source,
        "rule": rule.text,
        "source": tuned.source,
        "precision": ",".join(sorted(stored)),
        "compared_in": ",".join(sorted(d.name.replace("uint16", "bfloat16") for d in compared)),
    }
    state = read_json(tuned.path / "trainer_state.json")
    if isinstance(state.get("global_step"), int):
        metadata["steps"] = str(state["global_step"])
    history = state.get("log_history")
    rates = [
        entry["learning_rate"]
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("learning_rate"), float)
    ]
    if rates:
        metadata["learning_rate"] = str(max(rates))
    skipped = {**base.skipped, **tuned.skipped}
    if skipped:
        metadata["skipped"] = json.dumps(skipped)
    return metadata


def _check_changed(
    records: dict[str, Any], base: Checkpoint, tuned: Checkpoint, rule: Rule
) -> None:
    if any(record["nnz"] for record in records.values()):
        return
    bitwise = sum(record["changed"]["bitwise"] for record in records.values())
    numel = sum(math.prod(record["shape"]) for record in records.values())
    raise MaskMismatchError(
        f"expected {tuned.source} to differ from {base.source} under rule {rule.text}, found none "
        f"of {numel} weights changed ({bitwise} bitwise); pass the finetuned checkpoint, or "
        "another rule."
    )
