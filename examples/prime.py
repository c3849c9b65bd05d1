"""PRIME on sums: dense rewards from a process reward model that learns from outcomes alone.

    python examples/prime.py                     # a random 2% of the linear layers
    python examples/prime.py --mask mask.safetensors
    python examples/prime.py --full --learning-rate 3e-5

Algorithm 1 of arXiv 2502.01456. The implicit process reward model (PRM) is a language model that
starts as the policy does; a token's reward is beta * log(p of the PRM / p of the reference), and
their sum over an answer is trained online to tell right answers from wrong ones. Policy, PRM and
reference are one model here: two subnetworks of the same weights, "policy" and "prm", and neither.
A switch writes only the entries that differ.

As in the paper: 4 answers a prompt, no KL term, a PRM that learns twice as fast as the policy. Not
the paper's: beta is 0.5, not 0.05, since answers are four tokens long and not hundreds, and so
few log-ratios must tell right from wrong. As in the authors' code: prompts answered right in 20 to
80% of cases are kept, and advantages are whitened. See `sum_task.py` for the task. Expected last
line:

    Held-out sums exact: <share> before, <share> after; <seconds> s; summary.json in <folder>.

Measured (the first command, 7 CPU minutes): 52% before, 82% after, of 100.
"""

import random
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
    measured,
    minibatches,
    optimizer_of,
    sample,
    subnet,
    token_logprobs,
    update,
    whiten,
)
from sum_task import COMPLETION_TOKENS, HELD_OUT, exact_accuracy, problems, reward, warm_started
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedTokenizerBase

PROMPTS, COMPLETIONS = 16, 4  # of a step: so many problems, each answered so many times
ACCURACY = (0.2, 0.8)  # prompts the policy answers less or more often right are left out
MINIBATCH = 16
BETA = 0.5
PRM_RATE = 2.0  # times the policy's learning rate


def main() -> None:
    """Trains, and measures before and after."""
    options = command_line(__doc__, "prime", steps=40, learning_rate=1e-4).parse_args()
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
    """Takes `options.steps` steps, each Algorithm 1's lines 3 to 11; yields their figures."""
    accelerator = Accelerator()
    model.add_adapter("prm", subnet(options))
    optimizers = {}
    for name, rate in (("prm", PRM_RATE), ("policy", 1.0)):
        model.set_adapter(name)
        optimizers[name] = accelerator.prepare(optimizer_of(model, rate * options.learning_rate))
    model = accelerator.prepare(model)

    for _ in range(options.steps):
        prompts, answers = zip(*random.sample(problems, PROMPTS), strict=True)
        rollouts = sample(model, tokenizer, list(prompts), COMPLETIONS, COMPLETION_TOKENS)
        each = [answer for answer in answers for _ in range(COMPLETIONS)]
        outcomes = torch.tensor(reward(rollouts.texts, each), device=rollouts.tokens.device)
        figures = {"reward": outcomes.mean().item()}
        rows = of_middling_prompts(outcomes)
        figures["prompts"] = len(rows) // COMPLETIONS
        if len(rows):
            rollouts, outcomes = rollouts[rows], outcomes[rows]
            old = fixed_logprobs(model, rollouts)
            reference = fixed_logprobs(model, rollouts, reference=True)

            model.set_adapter("prm")
            process = process_rewards(model, rollouts, reference)
            prm_loss = outcome_loss(process, outcomes)
            update(accelerator, optimizers["prm"], prm_loss)
            model.set_adapter("policy")

            process, mask = process.detach(), rollouts.sampled
            advantages = whiten(leave_one_out(process, outcomes, mask), mask)
            for part in minibatches(len(rollouts), MINIBATCH):
                logprobs = token_logprobs(model, rollouts[part])
                loss = clipped_loss(logprobs, old[part], advantages[part], mask[part])
                update(accelerator, optimizers["policy"], loss)
            figures["prm_loss"] = prm_loss.item()
            figures["prm_accuracy"] = prm_accuracy(process, outcomes)
            figures["kl"] = (old - reference).sum(1).mean().item()
        yield figures


def of_middling_prompts(outcomes: torch.Tensor) -> torch.Tensor:
    """Online prompt filtering (section 3.3): rows of prompts that are neither easy nor hopeless.

    Args:
        outcomes: (prompts * COMPLETIONS,) 0 or 1.

    Returns:
        The rows' numbers; all COMPLETIONS of a prompt or none.
    """
    accuracy = outcomes.view(-1, COMPLETIONS).mean(1)
    kept = (accuracy >= ACCURACY[0]) & (accuracy <= ACCURACY[1])
    return kept.repeat_interleave(COMPLETIONS).nonzero()[:, 0]


def process_rewards(model: PeftModel, rollouts: Rollouts, reference: torch.Tensor) -> torch.Tensor:
    """Eq. 3: beta * log(p of the PRM / p of the reference), for every token.

    Args:
        model: With the PRM's subnetwork switched on.
        rollouts: Of the policy.
        reference: (rows, completion) log p under the reference.

    Returns:
        (rows, completion), 0 behind the end, with gradients.
    """
    return BETA * (token_logprobs(model, rollouts) - reference)


def outcome_loss(process: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """Algorithm 1, line 8: an answer is right with the sigmoid of its summed rewards."""
    return binary_cross_entropy_with_logits(process.sum(1), outcomes)


def prm_accuracy(process: torch.Tensor, outcomes: torch.Tensor) -> float:
    """Returns the share of answers whose summed rewards have the outcome's sign."""
    return ((process.sum(1) > 0) == outcomes.bool()).float().mean().item()


def leave_one_out(
    process: torch.Tensor, outcomes: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Eq. 5 with no discount: returns of process rewards and outcomes, each less a baseline.

    The baseline is the mean over the same prompt's other answers, of process rewards that of each
    answer's average token.

    Args:
        process: (prompts * COMPLETIONS, completion).
        outcomes: (prompts * COMPLETIONS,).
        mask: As `process`, bool.

    Returns:
        (prompts * COMPLETIONS, completion), 0 behind the end.
    """
    average = (process * mask).sum(1) / mask.sum(1)
    centred = (process - of_others(average)[:, None]) * mask
    to_come = centred.flip(1).cumsum(1).flip(1)
    return (to_come + (outcomes - of_others(outcomes))[:, None]) * mask


def of_others(values: torch.Tensor) -> torch.Tensor:
    """Returns for each answer the mean of the same prompt's other ones."""
    groups = values.view(-1, COMPLETIONS)
    return ((groups.sum(1, keepdim=True) - groups) / (COMPLETIONS - 1)).flatten()


if __name__ == "__main__":
    main()
