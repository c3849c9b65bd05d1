"""One training step of each algorithm, in the calls of TRL's trainers and their order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from subnet_ft.errors import ConfigError

ALGORITHMS = ("sft", "dpo", "grpo")
# What each of TRL's trainers asks its fused output head for.
HEAD_OUTPUTS = {
    "sft": ("log_probs", "entropy", "is_top1"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "grpo": ("log_probs", "entropy"),
}
Enter = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What a step is taken on.

    Args:
        algorithm: One of `ALGORITHMS`.
        batch: Rows a device: sequences of SFT, pairs of DPO, completions of GRPO.
        length: Tokens of a row, prompt and completion; none is padding.
        reference: A reference model's pass belongs to the step: DPO, GRPO with beta > 0.
        checkpointing: Recompute each layer in backward.

    Raises:
        ConfigError: An algorithm not listed, or a size below 1.
    """

    algorithm: str = "sft"
    batch: int = 1
    length: int = 1024
    reference: bool = False
    checkpointing: bool = True

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"algo: expected one of {ALGORITHMS}, found {self.algorithm!r}")
        if self.batch < 1 or self.length < 8:
            raise ConfigError(
                f"expected a batch of at least 1 and at least 8 tokens, found {self.batch} and "
                f"{self.length}"
            )
        if self.reference and self.algorithm == "sft":
            raise ConfigError("reference: expected dpo or grpo, found sft, which has none")

    @property
    def rows(self) -> int:
        """Sequences in a forward pass."""
        return self.batch * (2 if self.algorithm == "dpo" else 1)

    @property
    def prompt(self) -> int:
        """GRPO: tokens of a row that are prompt, a quarter."""
        return self.length // 4


def run(
    setting: Setting,
    model: nn.Module,
    reference: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    enter: Enter,
    *,
    clips: bool,
) -> int:
    """Take one step.

    Args:
        setting: On what.
        model: What trains.
        reference: A second model; None: the model itself with its adapter off.
        optimizer: Of its trainable parameters.
        enter: Is told the name of each phase as it begins.
        clips: Whether gradients are there to be clipped.

    Returns:
        Bytes of the key-value cache while it generated.
    """
    cache = 0
    ids = torch.zeros(setting.rows, setting.length, dtype=torch.int64)
    if setting.algorithm == "grpo":
        cache = generate(setting, model, ids, enter)
    theirs: torch.Tensor | None = None
    if setting.algorithm == "grpo" and setting.reference:
        theirs = reference_pass(model, reference, ids, enter)
    enter("forward")
    with torch.autocast("cpu", torch.bfloat16):
        output: Any = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False)
        if setting.algorithm == "dpo" and setting.reference:
            theirs = reference_pass(model, reference, ids, enter)
        loss = LOSSES[setting.algorithm](output, theirs)
    del output, theirs
    enter("backward")
    loss.backward()
    del loss
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if clips:
        enter("clip")
        nn.utils.clip_grad_norm_(trained, 1.0)
    enter("step")
    optimizer.step()
    optimizer.zero_grad()
    return cache


def reference_pass(
    model: nn.Module, reference: nn.Module | None, ids: torch.Tensor, enter: Enter
) -> torch.Tensor:
    """Return the reference's log-probabilities, (rows, length - 1)."""
    enter("reference")
    off: Any = nullcontext() if reference is not None else model.disable_adapter()  # type: ignore[operator]
    serves: Any = model if reference is None else reference
    with torch.no_grad(), off, torch.autocast("cpu", torch.bfloat16):
        found: torch.Tensor = serves(
            input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False
        ).log_probs
    enter("forward")
    return found


def generate(setting: Setting, model: nn.Module, ids: torch.Tensor, enter: Enter) -> int:
    """Read the prompts, then make the last token, when the cache is at its largest: its bytes."""
    cache = DynamicCache()
    enter("generate")
    with torch.no_grad(), in_evaluation(model), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids[:, : setting.prompt], past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            for name in ("keys", "values"):
                read = getattr(layer, name)
                rows, heads, _, size = read.shape
                setattr(layer, name, read.new_empty(rows, heads, setting.length - 1, size))
        model(input_ids=ids[:, -1:], past_key_values=cache, logits_to_keep=1)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Generate as trainers do: no checkpointing, which would refuse a cache."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def _sft(output: Any, theirs: None) -> torch.Tensor:
    loss: torch.Tensor = -output.log_probs.sum() / output.label_mask.sum().clamp(min=1)
    return loss


def _dpo(output: Any, theirs: torch.Tensor | None) -> torch.Tensor:
    sums = output.log_probs.sum(1)
    if theirs is not None:
        sums = sums - theirs.sum(1)
    chosen, rejected = sums.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def _grpo(output: Any, theirs: torch.Tensor | None) -> torch.Tensor:
    ours = output.log_probs
    ratio = torch.exp(ours - ours.detach())
    loss = -torch.min(ratio, ratio.clamp(0.8, 1.2))
    if theirs is not None:
        loss = loss + 0.04 * (torch.exp(theirs - ours) - (theirs - ours) - 1)
    return loss.mean()


LOSSES: dict[str, Callable[[Any, Any], torch.Tensor]] = {"sft": _sft, "dpo": _dpo, "grpo": _grpo}
