"""A prior run -> its mask: which weights of the base did it change?

Both checkpoints stream past in chunks, read and compared in two threads, straight into the mask
file. Memory is bounded by the chunk whatever the model's size.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from subnet_ft.checkpoints import Checkpoint, open_checkpoint, read_json
from subnet_ft.checkpoints.widened import WidenedCheckpoint
from subnet_ft.errors import CheckpointError, ConfigError, MaskMismatchError
from subnet_ft.extract.index_stream import IndexStream
from subnet_ft.extract.largest import Largest
from subnet_ft.extract.pair import Pair
from subnet_ft.extract.rules import PAPER_RULE, Changes, Rule, comparison_dtype
from subnet_ft.mask import SubnetMask
from subnet_ft.mask_file import file_metadata, header_bound, open_mask, storage_order
from subnet_ft.names import Patterns, select_names
from subnet_ft.progress import progress_bar
from subnet_ft.storage.codec import Checksum
from subnet_ft.storage.safetensors_writer import SafetensorsWriter, check_target

_CHUNK = 1 << 20


def extract_mask(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    rule: str = "bitwise",
    *,
    keep: float | None = None,
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
        keep: instead of a rule, a share in (0, 1]: of every parameter the weights with the largest
            |tuned - base| in fp32, at least one, and of equal ones those with the lowest index. For
            a run that changed everything, such as a LoRA; its delta is not rounded to the base's
            dtype first. Reads both checkpoints three times.
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
        ConfigError: an unknown rule, ``keep`` beside a rule or no share, a pattern that matches
            nothing, an existing output.
        MaskMismatchError: no weight changed.
        UnsupportedError: quantized weights or an adapter that cannot be merged.

    Example:
        >>> mask = extract_mask("base", "tuned", output="mask.safetensors")  # doctest: +SKIP
        >>> mask.density  # doctest: +SKIP
        0.119
        >>> mask = extract_mask("base", "lora", keep=0.02)  # doctest: +SKIP

    Source: arXiv 2505.11711, section 2.2.
    """
    choice = Rule.parse(rule) if keep is None else Largest(keep)
    if keep is not None and rule != "bitwise":
        raise ConfigError(f"expected a rule or keep, got rule {rule} and keep {keep}; pass one.")
    if chunk < 8 or chunk % 8:
        raise ConfigError(f"chunk must be a positive multiple of 8, got {chunk}; use {_CHUNK}.")
    if output is not None:
        check_target(Path(output), overwrite)
    before = open_checkpoint(base)
    if keep is not None:
        before = WidenedCheckpoint(before)
    after = open_checkpoint(tuned, base=before)
    check_pair(before, after)
    names = select_names(before.tensors, include, exclude)
    pair = Pair(before, after, chunk)
    if output is not None:
        _stream(pair, choice, names, Path(output), overwrite, progress)
        return open_mask(output)
    handle, name = tempfile.mkstemp(suffix=".safetensors", prefix="subnet_mask_")
    os.close(handle)
    try:
        _stream(pair, choice, names, Path(name), True, progress)
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
    pair: Pair,
    choice: Rule | Largest,
    names: Sequence[str],
    output: Path,
    overwrite: bool,
    progress: bool,
) -> None:
    """Write the mask file."""
    shapes = {name: pair.base.tensors[name].shape for name in names}
    order = storage_order(shapes)
    metadata = _metadata(pair, choice, names)
    widest = {name: _record(shapes[name], 10**18, "0" * 16, 10**18, 10**18) for name in names}
    reserve = header_bound(names, file_metadata(metadata, widest))
    total = sum(pair.numel(name) for name in names)
    records: dict[str, Any] = {}
    with (
        progress_bar(
            "extract", total * (3 if isinstance(choice, Largest) else 1), progress
        ) as advance,
        SafetensorsWriter(output, reserve, overwrite=overwrite) as writer,
        tempfile.TemporaryFile(dir=output.absolute().parent) as scratch,
        closing(_changes(pair, choice, order, advance)) as chunks,
    ):
        for name in order:
            stream = IndexStream(writer, scratch, name, pair.numel(name))
            checksum = Checksum()
            bitwise = paper = 0
            for start in pair.chunks(name):
                changes = next(chunks)
                stream.add(changes.bits, changes.where, start)
                checksum.update(changes.values)
                bitwise += changes.bitwise
                paper += changes.paper
            stream.finish()
            hexdigest = checksum.hexdigest() if stream.nnz else None
            records[name] = _record(shapes[name], stream.nnz, hexdigest, bitwise, paper)
        _check_changed(records, pair, choice.text)
        # In the model's order, whatever the order of storage.
        writer.metadata = file_metadata(metadata, {name: records[name] for name in names})


def _changes(
    pair: Pair, choice: Rule | Largest, names: Sequence[str], advance: Callable[[int], object]
) -> Generator[Changes, None, None]:
    """Yield what is in the mask, chunk by chunk."""
    if isinstance(choice, Largest):
        yield from choice.changes(pair, names, advance)
        return
    with closing(pair.compare(names, lambda _, *sides: choice.changes(*sides))) as chunks:
        for elements, changes in chunks:
            yield changes
            advance(elements)


def _record(
    shape: Sequence[int], nnz: int, checksum: str | None, bitwise: int, paper: int
) -> dict[str, Any]:
    record: dict[str, Any] = {"shape": list(shape), "nnz": nnz}
    if checksum:
        record["checksum"] = checksum
    record["changed"] = {"bitwise": bitwise, PAPER_RULE: paper}
    return record


def _metadata(pair: Pair, choice: Rule | Largest, names: Sequence[str]) -> dict[str, str]:
    """Say where the mask comes from, with the run's steps and peak learning rate where known."""
    base, tuned = pair.base, pair.tuned
    stored = {tuned.tensors[n].dtype for n in names}
    largest = isinstance(choice, Largest)
    compared = {"float32" if largest else comparison_dtype(*pair.dtypes(n)).name for n in names}
    metadata = {
        "base_model": base.source,
        "rule": choice.text,
        "source": tuned.source,
        "precision": ",".join(sorted(stored)),
        "compared_in": ",".join(sorted(d.replace("uint16", "bfloat16") for d in compared)),
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


def _check_changed(records: dict[str, Any], pair: Pair, rule: str) -> None:
    if any(record["nnz"] for record in records.values()):
        return
    bitwise = sum(record["changed"]["bitwise"] for record in records.values())
    numel = sum(math.prod(record["shape"]) for record in records.values())
    raise MaskMismatchError(
        f"expected {pair.tuned.source} to differ from {pair.base.source} under rule {rule}, found "
        f"none of {numel} weights changed ({bitwise} bitwise); pass the finetuned checkpoint, or "
        "another rule."
    )
