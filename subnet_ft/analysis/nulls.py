"""What a run that learned nothing, or only directions, would score in `analysis.agreement`.

Most weights an RL run changes move by exactly one bf16 ulp, so a high in-mask agreement may mean
little. Two nulls start from the untouched base and move every in-mask weight by exactly one ulp:

    one_ulp_coin_flip        up or down, each with probability 1/2: only the mask is known
    one_ulp_right_direction  the way the full run moved it: mask and sign are known, not the size

The untouched base and a random mask of equal density are the other two; they are ordinary runs.
Source: the nulls are ours; the claim they stand beside is arXiv 2505.11711 section 4.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subnet_ft.analysis.agreement import (
    agreement_figures,
    check_same_parameters,
    count_agreement,
    from_ordinals,
    mask_indices,
    ordinals,
)
from subnet_ft.checkpoints import Checkpoint


def move_one_ulp(base: Tensor, indices: Tensor, directions: Tensor) -> Tensor:
    """Move the weights at some indices to the next bf16 value in a direction.

    Args:
        base: the parameter, cast to bf16.
        indices: (nnz,) integer, flat.
        directions: (nnz,) integer, each -1, 0 or 1.

    Returns:
        bfloat16, the shape of `base`.
    """
    moved = base.detach().to(torch.bfloat16).flatten().clone()
    indices = indices.long()
    moved[indices] = from_ordinals(ordinals(moved[indices]) + directions)
    return moved.view(base.shape)


def coin_flips(count: int, generator: torch.Generator) -> Tensor:
    """Return (count,) int32, each -1 or 1 with probability 1/2."""
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.int32) * 2 - 1


def right_directions(base: Tensor, full: Tensor, indices: Tensor) -> Tensor:
    """Return (nnz,) int32: the sign of each in-mask weight's move in the full run, in bf16."""
    indices = indices.long()
    return torch.sign(ordinals(full.flatten()[indices]) - ordinals(base.flatten()[indices]))


def measure_nulls(
    base: Checkpoint, full: Checkpoint, mask: Mapping[str, Tensor], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Score both one-ulp nulls like a run, reading one parameter at a time.

    Args:
        base: where the run started.
        full: the run to reproduce.
        mask: name -> flat indices, such as a `SubnetMask`.
        seed: of the coin flips.

    Returns:
        "one_ulp_coin_flip" and "one_ulp_right_direction" -> what `measure_agreement` returns.

    Raises:
        CheckpointError: the two do not hold the same parameters.
    """
    check_same_parameters(base, full)
    generator = torch.Generator().manual_seed(seed)
    flipped, directed = [], []
    for name in base.tensors:
        before, after, indices = base.read(name), full.read(name), mask_indices(mask, name)
        flips = coin_flips(indices.numel(), generator)
        moved = move_one_ulp(before, indices, flips)
        flipped.append(count_agreement(before, after, moved, indices))
        moved = move_one_ulp(before, indices, right_directions(before, after, indices))
        directed.append(count_agreement(before, after, moved, indices))
    return {
        "one_ulp_coin_flip": agreement_figures(flipped),
        "one_ulp_right_direction": agreement_figures(directed),
    }
