"""What `ppo.py`, `prime.py` and `rft.py` share: sampling, log-probabilities, losses, bookkeeping.

One process, fp32, on whatever device accelerate finds. The policy is a PeftModel with a subnetwork,
and the reference is that model with the subnetwork switched off. `--full` is a subnetwork of every
weight: at density 1.0 that is full finetuning, and the reference comes the same way.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from subnet_ft import SubnetAdamW, SubnetConfig

CLIP = 0.2  # PPO's epsilon
MAX_GRAD_NORM = 1.0
FORWARD_ROWS = 64  # rows a forward without gradients


@dataclass
class Rollouts:
    """Sampled completions, those of a prompt side by side.

    Args:
        tokens: (rows, prompt + completion) int64; prompts end, completions start at one column.
        attended: the same shape, bool; not the padding.
        sampled: (rows, completion) bool; tokens the model chose, the end included.
        texts: The completions, decoded without special tokens.
    """

    tokens: torch.Tensor
    attended: torch.Tensor
    sampled: torch.Tensor
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: torch.Tensor) -> "Rollouts":
        """Picks rows by their numbers."""
        texts = [self.texts[row] for row in rows.tolist()]
        return Rollouts(self.tokens[rows], self.attended[rows], self.sampled[rows], texts)

    @property
    def completions(self) -> torch.Tensor:
        """(rows, completion) int64."""
        return self.tokens[:, -self.sampled.shape[1] :]


@torch.no_grad()
def sample(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    count: int,
    length: int,
) -> Rollouts:
    """Samples from the model as it is: temperature 1, no top-k, no top-p.

    So `token_logprobs` gives what the tokens were drawn by.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        count: Completions of each.
        length: Most tokens of a completion, the end included.
    """
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    batch = batch.to(model.device)
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=length,
        num_return_sequences=count,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    completions = tokens[:, batch["input_ids"].shape[1] :]
    # The padding may be the same token as the end: what counts is whether one came before.
    ends = (completions == tokenizer.eos_token_id).long()
    sampled = ends.cumsum(1) - ends == 0
    prompt = batch["attention_mask"].bool().repeat_interleave(count, dim=0)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollouts(tokens, torch.cat([prompt, sampled], dim=1), sampled, texts)


def forward(model: PeftModel, rollouts: Rollouts, hidden: bool = False) -> Any:
    """Runs the model where completion tokens are predicted.

    Returns:
        transformers' output; its logits are (rows, completion, vocabulary). With `hidden`, its
        hidden states are all positions'.
    """
    output = model(
        input_ids=rollouts.tokens,
        attention_mask=rollouts.attended.long(),
        position_ids=(rollouts.attended.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=rollouts.sampled.shape[1] + 1,
        output_hidden_states=hidden,
    )
    output.logits = output.logits[:, :-1]
    return output


def logprobs_of(logits: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    """Returns (rows, completion) float32: log p of each sampled token, 0 behind the end."""
    logprobs = logits.float().log_softmax(-1)
    picked = logprobs.gather(-1, rollouts.completions[..., None])[..., 0]
    return picked.masked_fill(~rollouts.sampled, 0.0)


def token_logprobs(model: PeftModel, rollouts: Rollouts) -> torch.Tensor:
    """Returns `logprobs_of` under what of the model is switched on, with gradients if they are."""
    return logprobs_of(forward(model, rollouts).logits, rollouts)


@torch.no_grad()
def fixed_logprobs(model: PeftModel, rollouts: Rollouts, reference: bool = False) -> torch.Tensor:
    """Returns `token_logprobs` without gradients, of the reference if asked."""
    with model.disable_adapter() if reference else nullcontext():
        parts = torch.arange(len(rollouts)).split(FORWARD_ROWS)
        return torch.cat([token_logprobs(model, rollouts[rows]) for rows in parts])


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean over tokens where `mask` holds."""
    return (values * mask).sum() / mask.sum()


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns them with mean 0 and variance 1 over tokens where `mask` holds, 0 elsewhere."""
    centred = (advantages - masked_mean(advantages, mask)) * mask
    return centred * (masked_mean(centred.square(), mask) + 1e-8).rsqrt()


def clipped_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), negated; mean over tokens.

    Args:
        logprobs: (rows, completion) under the policy, with gradients.
        old: The same under the policy that sampled.
        advantages: (rows, completion).
        mask: (rows, completion) bool.
    """
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def minibatches(rows: int, size: int) -> Iterator[torch.Tensor]:
    """Yields the numbers of all rows in random order, up to `size` at a time."""
    yield from torch.randperm(rows).split(size)


def subnet(options: argparse.Namespace) -> SubnetConfig:
    """What is trained: a mask file, everything, or a random 2% of the linear layers."""
    if options.full:
        return SubnetConfig(density=1.0, include="all")
    return SubnetConfig(mask=options.mask) if options.mask else SubnetConfig()


def load(
    options: argparse.Namespace, start: Path, name: str = "policy"
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Seeds everything and loads the model to start from, in fp32, with a subnetwork of it."""
    set_seed(options.seed)
    base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model = get_peft_model(base, subnet(options), adapter_name=name)
    return model.eval(), AutoTokenizer.from_pretrained(start)  # no dropout: ratios start at 1


def optimizer_of(model: torch.nn.Module, lr: float, *groups: dict[str, Any]) -> SubnetAdamW:
    """Returns an optimizer of what trains now: the values of the live subnetwork."""
    values = [p for p in model.parameters() if p.requires_grad]
    return SubnetAdamW([{"params": values}, *groups], lr=lr, weight_decay=0.0)


def update(accelerator: Accelerator, optimizer: Any, loss: torch.Tensor) -> None:
    """Takes one optimizer step on a loss."""
    accelerator.backward(loss)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    accelerator.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def command_line(doc: str, name: str, steps: int, learning_rate: float) -> argparse.ArgumentParser:
    """What all three ask for."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mask", type=Path, help="mask file; default: a random 2%% of each layer")
    which.add_argument("--full", action="store_true", help="train every weight")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs") / name)
    return parser


def measured(
    options: argparse.Namespace,
    model: PeftModel,
    accuracy: Callable[[], float],
    train: Callable[[], Iterator[dict[str, float]]],
) -> None:
    """Measures, trains, measures again; prints each step, writes `summary.json`.

    Args:
        options: The command line.
        model: Whose trained share to note.
        accuracy: Measures the model on the held-out problems.
        train: Takes one step at each turn and yields its figures.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    before = accuracy()
    curve = []
    for step, figures in enumerate(train(), start=1):
        curve.append(figures)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"step {step:3}: {shown}", flush=True)
    after = accuracy()
    of_base = [p for name, p in model.named_parameters() if "subnet_ft_values" not in name]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    summary = {
        "heldout_before": before,
        "heldout_after": after,
        "density": trained / sum(p.numel() for p in of_base),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "curve": curve,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"Held-out sums exact: {before:.0%} before, {after:.0%} after; {summary['seconds']:.0f} s; "
        f"summary.json in {options.output}."
    )
