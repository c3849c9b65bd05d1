"""Masks without a prior run: which entries to train when nothing is known yet."""

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import torch

from subnet_ft.mask import SubnetMask


def random_indices(numel: int, nnz: int, generator: np.random.Generator) -> torch.Tensor:
    """Draw ``nnz`` of ``numel`` positions uniformly, without replacement.

    Returns:
        (nnz,) int64, strictly increasing.
    """
    if nnz == numel:
        return torch.arange(numel)
    chosen = generator.choice(numel, nnz, replace=False, shuffle=False)
    chosen.sort()
    return torch.from_numpy(chosen)


def largest_entries(scores: torch.Tensor, nnz: int) -> torch.Tensor:
    """Find the ``nnz`` largest |scores|; of equal ones the lowest positions.

    Args:
        scores: Any shape, finite.
        nnz: How many, at least one.

    Returns:
        (nnz,) int64, strictly increasing flat positions.
    """
    sizes = scores.detach().flatten().abs()
    bound = sizes.topk(nnz, sorted=False).values.min()
    above = (sizes > bound).nonzero().view(-1)
    equal = (sizes == bound).nonzero().view(-1)[: nnz - above.numel()]
    return torch.cat([above, equal]).sort().values


def random(shapes: Mapping[str, tuple[int, ...]], density: float, seed: int = 0) -> SubnetMask:
    """Keep the same share of every parameter, chosen uniformly.

    At 1% such a mask matched full RL in arXiv 2602.01599; it is also the control every result about
    an extracted mask needs.

    Args:
        shapes: Parameter name -> shape.
        density: Share in (0, 1]; at least one entry of each parameter is kept.
        seed: Seed of the draw.
    """
    counts = {name: min(prod(s), max(1, round(density * prod(s)))) for name, s in shapes.items()}
    return _draw(shapes, counts, seed, {"selector": "random", "seed": str(seed)})


def random_like(mask: SubnetMask, seed: int = 0) -> SubnetMask:
    """Draw a mask with the shapes and the per-parameter counts of another: its control.

    Args:
        mask: Whose counts to keep.
        seed: Seed of the draw.
    """
    return _draw(mask.shapes, mask.counts, seed, {"selector": "random_like", "seed": str(seed)})


def _draw(
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int],
    seed: int,
    metadata: dict[str, str],
) -> SubnetMask:
    generator = np.random.default_rng(seed)
    indices = {
        name: random_indices(prod(shapes[name]), nnz, generator)
        for name, nnz in counts.items()
        if nnz
    }
    return SubnetMask(indices, shapes, metadata=metadata)


SELECTORS: dict[str, Callable[[Mapping[str, tuple[int, ...]], float, int], SubnetMask]] = {
    "random": random,
}
