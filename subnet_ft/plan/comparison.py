"""Every way to train one model side by side: what each needs, and what fits on a GPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from subnet_ft.plan.footprint import Footprint, trace_short
from subnet_ft.plan.methods import Method
from subnet_ft.plan.search import GIB, budget, draw_lines, largest_density
from subnet_ft.plan.steps import Setting
from subnet_kernels import encoding

# What a masked run is held against, each at its best.
RIVALS = (
    Method("lora", rank=16),
    Method("lora", rank=64),
    Method("sgd"),
    Method("full"),
    Method("full", weights=torch.float32),
)
ASSUMPTIONS = (
    "one GPU; no row is padded; flash attention, so that no scores exist",
    "TRL's fused output head with its Triton kernels, scoring every token; bf16 autocast, and bf16 "
    "weights but for the fp32 master",
    "an index takes 8 bytes an entry, as the adapter keeps it on every device",
    "full finetuning's reference is a second model in bf16 unless it is precomputed; an adapter's "
    "is its base",
    "of a GPU, 1 GiB goes to CUDA's context and workspaces, and 4% to fragmentation",
)


def masked(density: float) -> tuple[Method, Method]:
    """Return the two masked methods a plan shows: fp32 state, and the least there is."""
    small = Method("masked", density=density, state="8bit", released=True)
    return Method("masked", density=density), small


@dataclass(frozen=True)
class Row:
    """One way to train, and what it needs.

    Args:
        method: The way.
        setting: On what; ``reference`` is off where it was precomputed.
        precomputed: Whether it was.
        footprint: What it holds.
    """

    method: Method
    setting: Setting
    precomputed: bool
    footprint: Footprint

    @property
    def label(self) -> str:
        """What it is called where methods are compared."""
        return (
            f"{self.method.name}, reference precomputed" if self.precomputed else self.method.name
        )

    @property
    def reference(self) -> str:
        """Where the reference comes from."""
        if self.precomputed:
            return "precomputed"
        if not self.setting.reference:
            return "none"
        return "adapter off" if self.method.adapts else "second model"

    @property
    def packed_index_saves(self) -> int:
        """Bytes less if indices were kept as the kernels read them: int32, or a bitmap."""
        if self.method.kind != "masked":
            return 0
        bitmap = 1 / 8 + 8 / encoding.BITMAP_BLOCK  # bytes of an element, kept or not
        return int(self.footprint.trained * (8 - min(4, bitmap / self.method.density)))

    def fits(self, gib: float) -> bool:
        """Tell whether a GPU of so many GiB holds it."""
        return self.footprint.peak <= budget(gib)

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        method, found = self.method, self.footprint
        phase, layer = found.where
        return {
            "method": method.name,
            "kind": method.kind,
            "density": method.density or None,
            "rank": method.rank or None,
            "state": method.state if method.kind == "masked" else None,
            "released": not method.clips,
            "weight_grad": method.weight_grad,
            "algorithm": self.setting.algorithm,
            "reference": self.reference,
            "batch": self.setting.batch,
            "length": self.setting.length,
            "parameters": found.parameters,
            "trained": found.trained,
            "packed_index_saves": self.packed_index_saves,
            "bytes": found.parts(),
            "peak_bytes": found.peak,
            "peak_at": phase if layer is None else f"{phase}, layer {layer}",
            "state_bytes": found.model_state,
            "state_bytes_per_parameter": found.model_state / found.parameters,
        }


Rows = Sequence[Row]
Trace = Callable[[PretrainedConfig, Method, Setting], Footprint]


def rows(
    config: PretrainedConfig, method: Method, setting: Setting, trace: Trace = trace_short
) -> Iterator[Row]:
    """Trace a method; full finetuning under DPO with a precomputed reference as well.

    Args:
        config: The model's.
        method: How it trains.
        setting: On what.
        trace: Makes a footprint.
    """
    yield Row(method, setting, False, trace(config, method, setting))
    if setting.algorithm == "dpo" and setting.reference and not method.adapts:
        without = replace(setting, reference=False)
        yield Row(method, without, True, trace(config, method, without))


@dataclass(frozen=True)
class Densest:
    """How dense a mask may be.

    Args:
        method: A masked method, at the largest density that fits; None: none does.
        footprint: Its step, traced; None likewise.
        as_little: Name of each rival that a mask can undercut -> the largest density at which it
            needs no more, by the line through two traces; 0: none.
    """

    method: Method | None
    footprint: Footprint | None
    as_little: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        found: dict[str, Any] = {"method": None, "density": None, "as_little": self.as_little}
        if self.method is not None and self.footprint is not None:
            found |= {"method": self.method.name, "density": self.method.density}
            found |= {"trained": self.footprint.trained, "peak_bytes": self.footprint.peak}
        return found


def densest(
    config: PretrainedConfig, method: Method, setting: Setting, gibs: Sequence[float], found: Rows
) -> list[Densest]:
    """Find for each GPU how dense a mask fits, and how dense it may be to need less than rivals.

    Args:
        config: The model's.
        method: A masked one; its density is not looked at.
        setting: On what.
        gibs: The GPUs' memories.
        found: The rivals' rows.
    """
    lines = draw_lines(config, method, setting)
    as_little = {row.label: lines.densest(row.footprint.peak) for row in rivals(found)}
    results = []
    for gib in gibs:
        hit = largest_density(config, method, setting, lines, budget(gib))
        if hit is None:
            results.append(Densest(None, None, as_little))
        else:
            results.append(Densest(method.at(hit[0]), hit[1], as_little))
    return results


def rivals(found: Rows) -> list[Row]:
    """Pick the rows that often need less than a mask: LoRA, and SGD without a second model."""
    return [
        row
        for row in found
        if row.method.kind == "lora"
        or (row.method.kind == "sgd" and row.reference != "second model")
    ]


def sentence(gib: float, fits: Sequence[Densest], found: Rows) -> str:
    """Say how dense a mask fits on a GPU, and in the same breath what needs less.

    Args:
        gib: The GPU's memory.
        fits: Of each method of `masked`, in its order.
        found: The rivals' rows.
    """
    said = []
    for state, fit in zip(("fp32 state", "8-bit state, released"), fits, strict=True):
        density = "no density" if fit.method is None else f"up to {fit.method.density:.2%}"
        said.append(f"{density} with {state}")
    needs = []
    for row in rivals(found):
        less = " and ".join(f"{fit.as_little[row.label]:.2%}" for fit in fits)
        verdict = "fits" if row.fits(gib) else "does not fit"
        needs.append(
            f"{row.label} needs {row.footprint.peak / GIB:.1f} GiB and {verdict} "
            f"(a mask needs as little up to {less})"
        )
    return (
        f"{gib:g} GiB, {budget(gib) / GIB:.1f} of them for the step, hold a mask of linear layers, "
        f"{', '.join(said)}; {'; '.join(needs)}."
    )
