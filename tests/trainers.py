"""Every trainer there is, on a model of seconds, each made as its users make it."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from subnet_ft.errors import ConfigError
from tests.helpers import tiny_llama, tokens
from tests.training_helpers import (
    WORDS,
    arguments,
    preference_dataset,
    stock_trainer,
    text_dataset,
    tiny_tokenizer,
)

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
GENERATE: dict[str, Any] = {"max_completion_length": 6, "num_generations": 2}


def some_reward(completions: list[str], **_: Any) -> list[float]:
    """Favour some words over others, so that no two completions score alike."""
    return [sum(hash_of(word) for word in text.split()) / 100 for text in completions]


def hash_of(word: str) -> int:
    return sum(map(ord, word)) * 31 % 97


def prompts() -> Dataset:
    rng = random.Random(0)
    return Dataset.from_list([{"prompt": " ".join(rng.choices(WORDS, k=4))} for _ in range(16)])


def with_references() -> Dataset:
    return preference_dataset().add_column("reference", preference_dataset(seed=1)["chosen"])


def labelled() -> Dataset:
    rows = preference_dataset()
    good = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in rows]
    bad = [{"prompt": r["prompt"], "completion": r["rejected"], "label": False} for r in rows]
    return Dataset.from_list([row for pair in zip(good, bad, strict=True) for row in pair])


def messages() -> Dataset:
    roles = ("user", "assistant")
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": role, "content": text}
                    for role, text in zip(roles, (row["prompt"], row["chosen"]), strict=True)
                ]
            }
            for row in preference_dataset()
        ]
    )


def classifier() -> Any:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, 0
    return LlamaForSequenceClassification(config)


def made(
    trainer: type, config: type, data: Callable[[], Dataset], chat: bool = False, **options: Any
) -> Callable[..., Any]:
    """Return what makes a trainer, given model, directory and how the subnetwork gets in."""
    extra = {key: options.pop(key) for key in ("reward_funcs", "teacher_model") if key in options}

    def make(model: Any, directory: Path, checkpointing: bool | None, **how: Any) -> Any:
        tokenizer = tiny_tokenizer()
        if chat:
            tokenizer.chat_template = CHAT
        args = two_steps(directory, checkpointing, config, bf16=False, **options)
        given = {key: value() if key == "teacher_model" else value for key, value in extra.items()}
        return trainer(
            model, args=args, train_dataset=data(), processing_class=tokenizer, **given, **how
        )

    return make


def two_steps(
    directory: Path,
    checkpointing: bool | None,
    config: type[TrainingArguments] = TrainingArguments,
    **options: Any,
) -> Any:
    """Make arguments: two steps, a checkpoint after each; checkpointing None, reentrant or not."""
    return arguments(
        directory,
        config,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": bool(checkpointing)},
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        lr_scheduler_type="constant",
        **options,
    )


def stock(model: Any, directory: Path, checkpointing: bool | None, **how: Any) -> Trainer:
    return stock_trainer(model, two_steps(directory, checkpointing), **how)


def classification(model: Any, directory: Path, checkpointing: bool | None, **how: Any) -> Trainer:
    tokenizer = tiny_tokenizer()

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {**tokenizer(row["text"]), "labels": hash_of(row["text"]) % 2}

    return Trainer(
        model,
        two_steps(directory, checkpointing),
        train_dataset=text_dataset().map(encode, remove_columns=["text"]),
        data_collator=DataCollatorWithPadding(tokenizer),
        **how,
    )


class AccelerateLoop:
    """The loop people write themselves, with as much of a Trainer's face as the tests look at."""

    def __init__(self, model: Any, directory: Path, checkpointing: bool | None) -> None:
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        self.accelerator = Accelerator(cpu=True)
        self.directory, self.state = directory, TrainerState()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        if resume_from_checkpoint is not None:
            self.accelerator.load_state(resume_from_checkpoint)
            self.state.global_step = int(resume_from_checkpoint.rpartition("-")[2])
        while self.state.global_step < 2:
            ids = tokens(seed=self.state.global_step)
            self.accelerator.backward(self.model(input_ids=ids, labels=ids).loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.accelerator.save_state(self.directory / f"checkpoint-{self.state.global_step}")


def teacher() -> Any:
    return tiny_llama(seed=1)


REWARDED = {"reward_funcs": some_reward}
FP32_HEAD = "GRPO, fp32 head"
TRAINERS: dict[str, Callable[..., Any]] = {
    "Trainer": stock,
    "Trainer, classification": classification,
    "accelerate loop": AccelerateLoop,
    "SFT": made(SFTTrainer, SFTConfig, text_dataset),
    "SFT, packing": made(SFTTrainer, SFTConfig, text_dataset, packing=True, max_length=32),
    "DPO": made(DPOTrainer, DPOConfig, preference_dataset),
    "DPO, precomputed": made(
        DPOTrainer, DPOConfig, preference_dataset, precompute_ref_log_probs=True
    ),
    "KTO": made(KTOTrainer, KTOConfig, labelled),
    "GRPO": made(GRPOTrainer, GRPOConfig, prompts, beta=0.0, **GENERATE, **REWARDED),
    "GRPO, beta": made(GRPOTrainer, GRPOConfig, prompts, beta=0.1, **GENERATE, **REWARDED),
    FP32_HEAD: made(
        GRPOTrainer, GRPOConfig, prompts, cast_lm_head_to_fp32=True, **GENERATE, **REWARDED
    ),
    "RLOO": made(RLOOTrainer, RLOOConfig, prompts, **GENERATE, **REWARDED),
    "Reward": made(RewardTrainer, RewardConfig, preference_dataset),
    "Distillation": made(
        DistillationTrainer,
        DistillationConfig,
        prompts,
        teacher_model=teacher,
        max_completion_length=6,
    ),
    "ORPO": made(ORPOTrainer, ORPOConfig, preference_dataset),
    "CPO": made(CPOTrainer, CPOConfig, preference_dataset),
    "SimPO": made(CPOTrainer, CPOConfig, preference_dataset, loss_type="simpo", cpo_alpha=0.0),
    "OnlineDPO": made(OnlineDPOTrainer, OnlineDPOConfig, prompts, max_new_tokens=6, **REWARDED),
    "GKD": made(
        GKDTrainer, GKDConfig, messages, chat=True, teacher_model=teacher, max_new_tokens=6
    ),
    "TPO": made(TPOTrainer, TPOConfig, with_references),
}
REFERENCE = {"DPO", "DPO, precomputed", "KTO", "GRPO, beta", "RLOO", "OnlineDPO"}
CLASSIFIERS = {"Reward", "Trainer, classification"}
WAYS = ("peft_config", "wrapped", "callback")
CHECKPOINTING = {"plain": None, "checkpointing": False, "reentrant": True}
# (trainer, way) -> what is raised, its words, and the reason for the table.
NOT_POSSIBLE: dict[tuple[str, str], tuple[type[Exception], str, str]] = {
    **{
        (name, "peft_config"): (
            TypeError,
            "peft_config",
            "no such argument; wrap the model by `get_peft_model`",
        )
        for name in ("Trainer", "Trainer, classification", "accelerate loop")
    },
    ("accelerate loop", "callback"): (TypeError, "callbacks", "there is none to call back"),
    ("Trainer, classification", "callback"): (
        ConfigError,
        "modules_to_save",
        "`modules_to_save` does not fit into its checkpoints",
    ),
}


LEFT_OUT = {"Trainer, classification": "score.weight", FP32_HEAD: "lm_head.weight"}  # of the mask


def model_for(name: str, directory: Path) -> Any:
    """Return the model a trainer wants, the same at every call, from a directory.

    TRL loads the reference of a model without an adapter from where the model came from.
    """
    model = classifier() if name in CLASSIFIERS else tiny_llama()
    if name == FP32_HEAD:
        model = tiny_llama(torch.bfloat16, tied=False)
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory)
