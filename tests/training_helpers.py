"""A tokenizer, data sets and trainer arguments small enough for seconds-long real runs."""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

WORDS = [f"w{i}" for i in range(90)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocab = special | {word: i + len(special) for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _sentence(rng: random.Random, low: int = 4, high: int = 16) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def text_dataset(rows: int = 48, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list([{"text": _sentence(rng)} for _ in range(rows)])


def preference_dataset(rows: int = 16, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {"prompt": _sentence(rng) + " ", "chosen": _sentence(rng), "rejected": _sentence(rng)}
            for _ in range(rows)
        ]
    )


def arguments(directory: Path, cls: type[TrainingArguments] = TrainingArguments, **kw: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 1,
    }
    return cls(output_dir=str(directory), **(defaults | kw))


def stock_trainer(
    model: Any, args: TrainingArguments, callbacks: list[TrainerCallback] | None = None
) -> Trainer:
    """The plain transformers.Trainer, language modelling on random words."""
    tokenizer = tiny_tokenizer()
    data = text_dataset().map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
        callbacks=callbacks,
    )


__all__ = [
    "TrainOutput",
    "arguments",
    "preference_dataset",
    "stock_trainer",
    "text_dataset",
    "tiny_tokenizer",
]
