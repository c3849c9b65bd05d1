"""Rejection sampling on sums: finetuning on the model's own right answers, once or in rounds.

    python examples/rft.py                       # a random 2% of the linear layers
    python examples/rft.py --mask mask.safetensors
    python examples/rft.py --full --learning-rate 3e-5
    python examples/rft.py --rounds 3            # RAFT++

One round is rejection-sampling finetuning (RFT, arXiv 2308.01825): several answers to every
training problem, the right ones kept, each different one once, an epoch of SFT on them. With more,
every round samples from the model as it is by then and keeps every right answer, and the loss is
RAFT++'s (arXiv 2504.11343): PPO's clipped ratio, with advantage 1 for what was kept. Both train on
answers the model gave: the in-distribution SFT of arXiv 2505.11711. See `sum_task.py` for the
task. Expected last line:

    Held-out sums exact: <share> before, <share> after; <seconds> s; summary.json in <folder>.

Measured, of 100: 52% before; 76% after RFT (1 CPU minute), 78% after RAFT++ (4 CPU minutes).
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from peft import PeftModel
from rollouts import (
    Rollouts,
    clipped_loss,
    command_line,
    fixed_logprobs,
    load,
    masked_mean,
    measured,
    minibatches,
    optimizer_of,
    sample,
    token_logprobs,
    update,
)
from sum_task import COMPLETION_TOKENS, HELD_OUT, exact_accuracy, problems, reward, warm_started
from transformers import PreTrainedTokenizerBase

COMPLETIONS = 8  # of each problem, a round
MINIBATCH = 16


def main() -> None:
    """Trains, and measures before and after."""
    parser = command_line(__doc__, "rft", steps=None, learning_rate=1e-4)
    parser.add_argument("--rounds", type=int, default=1, help="1: RFT; more: RAFT++")
    options = parser.parse_args()
    model, tokenizer = load(options, warm_started())
    held_out = problems("heldout", HELD_OUT)
    measured(
        options,
        model,
        lambda: exact_accuracy(model, tokenizer, held_out),
        lambda: train(model, tokenizer, problems("train", 100), reward, options),
    )


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[tuple[str, str]],
    reward: Callable[[list[str], list[str]], list[float]],
    options: Namespace,
) -> Iterator[dict[str, float]]:
    """Takes `options.rounds` rounds: sample, keep, finetune; yields their figures.

    A round is an epoch, or `options.steps` updates where that is less.
    """
    accelerator = Accelerator()
    optimizer = optimizer_of(model, options.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    prompts, answers = zip(*problems, strict=True)
    each = [answer for answer in answers for _ in range(COMPLETIONS)]
    for _ in range(options.rounds):
        rollouts = sample(model, tokenizer, list(prompts), COMPLETIONS, COMPLETION_TOKENS)
        earned = reward(rollouts.texts, each)
        kept = rollouts[right_ones(rollouts, earned, once=options.rounds == 1)]
        figures = {"reward": sum(earned) / len(earned), "kept": len(kept)}
        if not len(kept):
            yield figures
            continue
        old = fixed_logprobs(model, kept)
        for taken, rows in enumerate(minibatches(len(kept), MINIBATCH)):
            if taken == options.steps:
                break
            logprobs, mask = token_logprobs(model, kept[rows]), kept.sampled[rows]
            if options.rounds == 1:
                loss = -masked_mean(logprobs, mask)
            else:
                loss = clipped_loss(logprobs, old[rows], torch.ones_like(logprobs), mask)
            update(accelerator, optimizer, loss)
        yield figures | {"logprob": masked_mean(old, kept.sampled).item()}


def right_ones(rollouts: Rollouts, earned: Sequence[float], once: bool) -> torch.Tensor:
    """Returns the numbers of the rows that earned the full reward.

    Args:
        rollouts: The sampled rows.
        earned: Each row's reward, 1.0 if it is right.
        once: Of rows with the same tokens, the first alone.
    """
    rows = [row for row, value in enumerate(earned) if value == 1.0]
    if once:
        first = {tuple(rollouts.tokens[row].tolist()): row for row in reversed(rows)}
        rows = sorted(first.values())
    return torch.tensor(rows, dtype=torch.long)


if __name__ == "__main__":
    main()
