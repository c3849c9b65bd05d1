"""How closely a run reproduces another, weight by weight, overall and inside the mask.

With w0 the base, f the run to reproduce, g the run to judge (all cast to bf16) and M the mask:

    agreement_bitwise  = share of all weights with g == f (so -0 equals +0)
    agreement_1e-5     = share of all weights with |g - f| <= 1e-5
    in_mask_agreement_* the same, over the weights in M only
    in_mask_sign_agreement = share of M with sign(g - w0) == sign(f - w0); two zeros agree, a zero
                             and a move do not
    ulp_error_histogram    = share of M by how many bf16 values lie between g and f

Outside M a masked run equals w0, and so does f where M was extracted from f: the overall shares are
at least 1 - density for *any* masked run. The in-mask shares say whether f was reproduced, beside
the nulls of `subnet_ft.analysis.nulls`.

Source: arXiv 2505.11711 section 4, which reports the overall share at 1e-5 and 1e-4. Its rule, and
that of its published script, takes the difference and the threshold in bf16; so does this. Differs
in that it adds the in-mask shares, signs and ulps.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from subnet_ft.checkpoints import Checkpoint
from subnet_ft.errors import CheckpointError
from subnet_ft.extract.rules import Rule
from subnet_ft.storage.arrays import to_array

# Its counts cover both rules: unchanged from f to g is what agrees.
RULE = Rule.parse("bitwise")
# Name of a class of ulp errors -> its largest member.
ULP_CLASSES = {"0": 0, "1": 1, "2": 2, "3-4": 4, ">4": None}


def ordinals(values: Tensor) -> Tensor:
    """Number the bf16 values in ascending order, both zeros as 0.

    Neighbouring values differ by 1, so differences are distances in ulps, exact across binades.

    Args:
        values: any shape, cast to bfloat16.

    Returns:
        int32 of the same shape.

    Example:
        >>> ordinals(torch.tensor([-0.0, 0.0, 1.0, 1.0078125])).tolist()
        [0, 0, 16256, 16257]
    """
    bits = values.to(torch.bfloat16).view(torch.int16).int()
    # bf16 is sign and magnitude: the bits below the sign count up from zero.
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def from_ordinals(numbers: Tensor) -> Tensor:
    """Return the bf16 values with these ordinals, the inverse of `ordinals` (0 gives +0)."""
    bits = torch.where(numbers < 0, -numbers - 0x8000, numbers)
    return bits.to(torch.int16).view(torch.bfloat16)


def count_agreement(base: Tensor, full: Tensor, run: Tensor, indices: Tensor) -> Counter[str]:
    """Count what agrees in one parameter.

    Args:
        base: the untouched parameter; any floating dtype, cast to bf16 like the others.
        full: the parameter after the run to reproduce, same shape.
        run: the parameter after the run to judge, same shape.
        indices: (nnz,) integer, the mask's flat indices into it.

    Returns:
        Integers that add up over parameters; `agreement_figures` makes shares of them.
    """
    base, full, run = (x.detach().to(torch.bfloat16).reshape(-1) for x in (base, full, run))
    counts = Counter(weights=full.numel(), in_mask_weights=indices.numel())
    counts.update(_count_equal(full, run))

    indices = indices.long()
    base, full, run = base[indices], full[indices], run[indices]
    counts.update({f"in_mask_{key}": n for key, n in _count_equal(full, run).items()})
    base_at, full_at, run_at = ordinals(base), ordinals(full), ordinals(run)
    same_sign = torch.sign(run_at - base_at) == torch.sign(full_at - base_at)
    counts["in_mask_sign_agreement"] = int(same_sign.sum())

    ulps = (run_at - full_at).abs()
    below = 0
    for name, largest in ULP_CLASSES.items():
        up_to = ulps.numel() if largest is None else int((ulps <= largest).sum())
        counts[f"ulps {name}"] = up_to - below
        below = up_to
    return counts


def _count_equal(a: Tensor, b: Tensor) -> dict[str, int]:
    changes = RULE.changes(to_array(a), to_array(b))
    return {
        "agreement_1e-5": a.numel() - changes.paper,
        "agreement_bitwise": a.numel() - changes.bitwise,
    }


def agreement_figures(counts: Iterable[Counter[str]]) -> dict[str, Any]:
    """Turn the counts of all parameters into shares, those of an empty mask into None.

    Args:
        counts: one `count_agreement` per parameter.

    Returns:
        The five shares and the histogram of the module's docstring, by those names.
    """
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)

    def share(key: str, of: str) -> float | None:
        return total[key] / total[of] if total[of] else None

    return {
        "agreement_1e-5": share("agreement_1e-5", "weights"),
        "agreement_bitwise": share("agreement_bitwise", "weights"),
        **{
            key: share(key, "in_mask_weights")
            for key in (
                "in_mask_agreement_1e-5",
                "in_mask_agreement_bitwise",
                "in_mask_sign_agreement",
            )
        },
        "ulp_error_histogram": {
            name: share(f"ulps {name}", "in_mask_weights") for name in ULP_CLASSES
        },
    }


def measure_agreement(
    base: Checkpoint, full: Checkpoint, run: Checkpoint, mask: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Compare two finished runs from one base, reading one parameter at a time.

    Args:
        base: where both started.
        full: the run to reproduce.
        run: the run to judge; `base` itself is the null that nothing was trained.
        mask: name -> flat indices, such as a `SubnetMask`; without a name, none of its weights.

    Returns:
        What `agreement_figures` returns.

    Raises:
        CheckpointError: the three do not hold the same parameters.

    Example:
        >>> runs = [open_checkpoint(name) for name in ("base", "full", "run")]  # doctest: +SKIP
        >>> figures = measure_agreement(*runs, SubnetMask.load("mask"))  # doctest: +SKIP
    """
    check_same_parameters(base, full)
    check_same_parameters(base, run)
    return agreement_figures(
        count_agreement(base.read(name), full.read(name), run.read(name), mask_indices(mask, name))
        for name in base.tensors
    )


def check_same_parameters(a: Checkpoint, b: Checkpoint) -> None:
    """Refuse two checkpoints of different models.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    for name in [*a.tensors, *b.tensors]:
        left, right = (c.tensors[name].shape if name in c.tensors else "none" for c in (a, b))
        if left != right:
            raise CheckpointError(
                f"{name}: expected the same shape in both, found {left} in {a.source} and {right} "
                f"in {b.source}; compare runs of one base model."
            )


def mask_indices(mask: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a parameter's indices, empty where the mask has none."""
    return mask[name] if name in mask else torch.empty(0, dtype=torch.int64)
