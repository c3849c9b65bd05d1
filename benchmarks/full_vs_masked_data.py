"""What `benchmarks/full_vs_masked.py` trains on: sums, for any model, and a small model of our own.

Models with a chat template get `examples/chain_sum.py`'s conversations, and for GRPO the prompts of
`examples/sum_task.py`; models without one get bare text ("12+7=", "19"), for SFT and DPO sums of
three terms.
"""

import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.small_state import ALPHABET, llama, pretrained

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import chain_sum
import sum_task
from smollm2 import cache_directory, model_directory

SMALL = "small"  # the name of the model of this file
HELD_OUT = 256  # of bare sums
PRETRAIN_STEPS = 600
Rows = list[dict[str, Any]]


def model_path(model: str, algorithm: str) -> Path:
    """Return a directory with a model.

    Args:
        model: A directory, a hub id, "small", or "SmolLM2-135M": with the start GRPO needs.
        algorithm: "sft", "dpo" or "grpo".
    """
    if model == SMALL:
        return small_model()
    if model == "SmolLM2-135M":
        return sum_task.warm_started() if algorithm == "grpo" else model_directory()
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.jinja"]))


def small_model() -> Path:
    """Return the 3.2M-parameter Llama of `benchmarks/small_state.py`, made once and kept."""
    target = cache_directory() / f"sums-3m-{PRETRAIN_STEPS}"
    if target.is_dir():
        return target
    print("Pretraining the small model on sums of two terms (once) ...", flush=True)
    model = llama(pretrained(PRETRAIN_STEPS, lambda: None))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 0, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        model.save_pretrained(unfinished)
        character_tokenizer().save_pretrained(unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; a newline ends an answer and pads."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="\n"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n", pad_token="\n")


def rows(algorithm: str, tokenizer: Any, count: int) -> tuple[Rows, Rows]:
    """Return rows to train on and held-out rows, in the algorithm's own format.

    Args:
        algorithm: "sft": prompt and completion; "dpo": prompt, chosen, rejected; "grpo": prompt and
            answers.
        tokenizer: Of the model.
        count: How many to train on; they repeat where the task has fewer.
    """
    chats = tokenizer.chat_template is not None
    if algorithm == "grpo":
        trained, held_out = (
            [
                {"prompt": p if chats else bare(p), "answers": a}
                for p, a in sum_task.problems(s, 100)
            ]
            for s in ("train", "heldout")
        )
    elif chats:
        trained, held_out = chain_sum.training_pairs(count), chain_sum.heldout_pairs()
    else:
        trained, held_out = bare_pairs(count)
    if algorithm == "sft":
        trained, held_out = (
            [{"prompt": r["prompt"], "completion": r["chosen"]} for r in part]
            for part in (trained, held_out)
        )
    return trained, held_out


def bare(prompt: str) -> str:
    """Return a prompt of `examples/sum_task.py` without its words and spaces."""
    return prompt.removeprefix("Sums: ").replace(" ", "")


def bare_pairs(count: int) -> tuple[Rows, Rows]:
    """Return sums of three terms, the right answer against a near miss; and held-out ones."""
    held_out = draw_pairs(HELD_OUT, 1 << 24)
    seen = {row["prompt"] for row in held_out}
    drawn = draw_pairs(count + HELD_OUT, 1 << 20)
    return [row for row in drawn if row["prompt"] not in seen][:count], held_out


def draw_pairs(count: int, seed: int) -> Rows:
    """Draw as many sums of three terms."""
    problems = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=count, min_terms=3, max_terms=3, max_digits=2
    )
    rng = random.Random(seed)
    return [
        {
            "prompt": p["metadata"]["expression"].replace(" ", "") + "=",
            "chosen": p["answer"],
            "rejected": str(int(p["answer"]) + rng.choice(chain_sum.OFFSETS)),
        }
        for p in problems
    ]


@torch.no_grad()
def exact(model: Any, tokenizer: Any, held_out: Rows) -> float:
    """Return the share of GRPO's held-out problems that are answered exactly."""
    problems = [(row["prompt"], row["answers"]) for row in held_out]
    return sum_task.exact_accuracy(model, tokenizer, problems)


def tokenizer_of(directory: Path) -> Any:
    """Load a model's tokenizer; one without padding pads with its end."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
