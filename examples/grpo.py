"""GRPO on sums with a reward that can be checked, of every weight or of a mask's.

    python examples/grpo.py                                       # every weight
    subnet-ft extract START runs/grpo/full -o mask.safetensors    # START: as printed
    python examples/grpo.py --mask mask.safetensors

TRL's `GRPOTrainer` as it is; the one difference is its `peft_config`. See `sum_task.py` for the
task and for the model to start from. Expected last lines:

    Start: <directory>
    full: held-out sums exact <share> before, <share> after; <seconds> s; saved in <directory>
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftConfig
from sum_task import (
    COMPLETION_TOKENS,
    HELD_OUT,
    exact_accuracy,
    problems,
    reward,
    warm_started,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from subnet_ft import SubnetConfig

PROMPTS, GENERATIONS = 4, 8  # of a step: so many problems, each answered so many times


def main() -> None:
    """Trains, measures before and after, saves the model and `run.json` beside it."""
    options = parse_options()
    started = time.perf_counter()
    start = warm_started()
    print(f"Start: {start}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(start)
    held_out = problems("heldout", HELD_OUT)
    before = exact_accuracy(model, tokenizer, held_out)

    prompts, answers = zip(*problems("train", 100), strict=True)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=training_arguments(options),
        train_dataset=Dataset.from_dict({"prompt": prompts, "answers": answers}),
        processing_class=tokenizer,
        peft_config=peft_config(options),
    )
    trainer.train()
    trainer.save_model()

    after = exact_accuracy(trainer.model, tokenizer, held_out)
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    figures = {
        "start": str(start),
        "heldout_problems": len(held_out),
        "heldout_before": before,
        "heldout_after": after,
        "rewards": [entry["reward"] for entry in log],
        "seconds_a_step": [entry["step_time"] for entry in log],
        "trainable_parameters": trainer.model.num_parameters(only_trainable=True),
        "settings": settings(trainer.args),
        "seconds": time.perf_counter() - started,
    }
    (options.output / "run.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(
        f"{options.output.name}: held-out sums exact {before:.0%} before, {after:.0%} after; "
        f"{figures['seconds']:.0f} s; saved in {options.output}"
    )


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mask", type=Path, help="mask file; without it everything is trained")
    which.add_argument("--lora", action="store_true", help="LoRA, rank 16, all linear layers")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="folder; by default runs/grpo/<what is trained>"
    )
    options = parser.parse_args()
    name = "lora" if options.lora else "masked" if options.mask else "full"
    options.output = options.output or Path("runs/grpo") / name
    return options


def peft_config(options: argparse.Namespace) -> PeftConfig | None:
    """Returns what is trained; None: every weight."""
    if options.lora:
        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return SubnetConfig(mask=options.mask) if options.mask else None


def training_arguments(options: argparse.Namespace) -> GRPOConfig:
    """What all runs share, learning rate and seed apart."""
    return GRPOConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=PROMPTS * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=COMPLETION_TOKENS,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,  # it saves activations, of which there are few here
        seed=options.seed,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )


def settings(args: GRPOConfig) -> dict[str, Any]:
    """What to write beside the figures."""
    names = ["max_steps", "per_device_train_batch_size", "num_generations", "learning_rate"]
    names += ["max_completion_length", "temperature", "beta", "loss_type", "max_grad_norm", "seed"]
    return {name: getattr(args, name) for name in names}


if __name__ == "__main__":
    logging.disable_progress_bar()
    main()
