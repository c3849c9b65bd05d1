"""One run of `benchmarks/full_vs_masked.py`, in a process of its own so that its memory is its own.

    python -m benchmarks.full_vs_masked_run SPECIFICATION.json OUTPUT.json

Trains one method with TRL's own trainer and writes what it cost, what it learned or both. `Spec`
says what a specification holds.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from benchmarks.full_vs_masked_data import exact, rows, sum_task, tokenizer_of
from benchmarks.full_vs_masked_measure import PhaseClock, flush_seconds, state_bytes
from benchmarks.full_vs_masked_methods import TOLERANCE, Counts, Method, Setup, all_methods, count
from benchmarks.turns import Turn

# isort: split
from quickstart_run import peak_rss_bytes, trainable_parameters  # of examples/, as data's imports

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
}
DTYPES = {"fidelity": torch.float32, "memory": torch.bfloat16}
GENERATIONS = 8  # answers to a problem, of GRPO
GENERATED, GENERATE_ROWS, GENERATE_TIMES = 16, 4, 2


@dataclass(frozen=True)
class Spec:
    """What a run is.

    Args:
        model: Directory.
        algorithm: "sft", "dpo" or "grpo".
        method: Its name; see `benchmarks.full_vs_masked_methods`.
        mode: "fidelity" or "memory".
        steps: Optimizer steps; 0: only evaluate.
        warmup: How many of them no time is taken of.
        batch: Rows a forward pass; of pairs with DPO, of answers with GRPO.
        accumulation: Forward passes a step.
        learning_rate: Constant.
        seed: Of the data's order, and of what is drawn.
        threads: Of torch on a CPU.
        mask: A mask file, for those that need it.
        evaluate: Whether to measure on held-out rows.
        save: Directory for the trained model; None: it is only weighed.
        round: Tells runs apart that are otherwise the same. Only the first generates and saves.
        company: The methods whose runs take turns with this one, itself among them; see `turns`.
    """

    model: str
    algorithm: str
    method: str
    mode: str
    steps: int
    warmup: int
    batch: int
    accumulation: int
    learning_rate: float
    seed: int
    threads: int
    mask: str | None = None
    evaluate: bool = False
    save: str | None = None
    round: int = 0
    company: tuple[str, ...] = ()


def main() -> None:
    """Read the specification, run it, write the figures."""
    specification, output = (Path(word) for word in sys.argv[1:])
    logging.disable_progress_bar()
    spec = Spec(**json.loads(specification.read_text()))
    unfinished = output.with_suffix(".part")
    unfinished.write_text(json.dumps(run(spec), indent=1) + "\n")
    unfinished.rename(output)


def run(spec: Spec) -> dict[str, Any]:
    """Train, and return all figures."""
    torch.set_num_threads(spec.threads)
    wait = Turn().wait if spec.company else lambda: None
    before = psutil.Process().memory_info().rss
    wait()
    method = all_methods()[spec.method]
    with tempfile.TemporaryDirectory() as directory:
        trainer, held_out = build(spec, method, Path(directory))
        figures: dict[str, Any] = {
            "parameters": counts_of(spec.model).parameters,
            "device": trainer.model.device.type,
        }
        if spec.steps:
            figures |= train(trainer, spec, before, wait)
            wait()
        if spec.evaluate:
            figures["heldout"] = evaluate(trainer, spec, held_out)
        if spec.steps and not spec.evaluate and spec.round == 0:
            figures |= generation(trainer)
            figures["checkpoint_bytes"] = saved_bytes(trainer, Path(directory) / "saved")
        if spec.save:
            trainer.save_model(spec.save)
            trainer.state.save_to_json(str(Path(spec.save) / "trainer_state.json"))
    return figures


def counts_of(model: str) -> Counts:
    """Measure a model of a directory without its weights."""
    with torch.device("meta"):
        return count(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)))


def build(spec: Spec, method: Method, directory: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Build the trainer; return it and the held-out rows."""
    torch.manual_seed(spec.seed)
    tokenizer = tokenizer_of(Path(spec.model))
    counts = counts_of(spec.model)
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=DTYPES[spec.mode])
    if method.prepare:
        method.prepare(model)
    steps = max(spec.steps, 1)
    trained, held_out = rows(spec.algorithm, tokenizer, steps * spec.batch * spec.accumulation)
    trainer_class, _ = TRAINERS[spec.algorithm]
    more: dict[str, Any] = {}
    if spec.algorithm == "grpo":
        more["reward_funcs"] = sum_task.reward
    elif spec.evaluate:
        more["eval_dataset"] = Dataset.from_list(held_out)
    trainer = trainer_class(
        model=model,
        args=training_arguments(spec, method, directory),
        train_dataset=Dataset.from_list(trained),
        processing_class=tokenizer,
        peft_config=adapter(spec, method, counts),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    if method.optimizer:
        optimizer, options = method.optimizer
        decay = {} if method.group == "full" else {"weight_decay": 0.0}
        options = {"lr": spec.learning_rate, **decay, **options}
        trainer.optimizer_cls_and_kwargs = (optimizer, options)
    numbers = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if method.equal and abs(numbers / counts.equal - 1) > TOLERANCE:
        raise SystemExit(
            f"{method.name}: expected {counts.equal:,} trained numbers within {TOLERANCE:.0%}, "
            f"found {numbers:,}; the methods of equal count no longer are"
        )
    return trainer, held_out


def multiplies_bf16() -> bool:
    """Whether products in bf16 are the device's own.

    A processor without them has torch emulate them: on an AMD EPYC with AVX2 a full DPO step of
    SmolLM2-135M, tried once, took 58 s so, and 4 to 6 s in fp32.
    """
    if torch.cuda.is_available():
        return True
    mkldnn = torch.backends.mkldnn.is_available()
    return mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def adapter(spec: Spec, method: Method, counts: Any) -> Any:
    """The method's PEFT config, or None."""
    if method.adapter is None:
        return None
    return method.adapter(Setup(counts, spec.seed, Path(spec.mask) if spec.mask else None))


def training_arguments(spec: Spec, method: Method, directory: Path) -> Any:
    """What all methods share, and what this one changes."""
    _, config = TRAINERS[spec.algorithm]
    of_algorithm: dict[str, dict[str, Any]] = {
        "sft": {},
        "dpo": {"beta": 0.1},
        "grpo": {
            "beta": 0.0,
            "num_generations": GENERATIONS,
            "max_completion_length": sum_task.COMPLETION_TOKENS,
        },
    }
    arguments = {
        "output_dir": str(directory),
        "max_steps": max(spec.steps, 1),
        "per_device_train_batch_size": spec.batch,
        "per_device_eval_batch_size": 32,
        "gradient_accumulation_steps": spec.accumulation,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": multiplies_bf16(),  # autocast; the weights keep the dtype they were loaded in
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "seed": spec.seed,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
    }
    return config(**arguments | of_algorithm[spec.algorithm] | dict(method.arguments))


def train(trainer: Any, spec: Spec, rss_before: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Train and measure; before each step a turn ends, and the next is waited for."""
    state: dict[str, int] = {}

    def at_step() -> None:
        # The first step makes the optimizer's state: weigh a later one, where there is one.
        state.update(state_bytes(trainer))

    clock = PhaseClock(trainer, importlib.import_module(type(trainer).__module__), at_step, wait)
    trainer.train()
    clock.close()
    timed = clock.steps[min(spec.warmup, spec.steps - 1) :]
    phases = clock.medians(timed)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    rewards = [e["reward"] for e in trainer.state.log_history if "reward" in e]
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else peak_rss_bytes() - rss_before
    )
    step = phases.pop("step")
    flush = flush_seconds(trainer.model)
    trained = rewards or losses
    return {
        "trainable": trainable_parameters(trainer),
        "state_bytes": state,
        "peak_bytes": peak,
        "step_seconds": step,
        "steps_seconds": [step["step"] for step in timed],
        "phases": phases if flush is None else phases | {"flush": flush},
        "losses": losses,
        "rewards": rewards,
        "final": fmean(trained[-max(1, len(trained) // 3) :]),
    }


def evaluate(trainer: Any, spec: Spec, held_out: list[dict[str, Any]]) -> dict[str, float]:
    """Measure on held-out rows."""
    if spec.algorithm == "grpo":
        return {"heldout": exact(trainer.model, trainer.processing_class, held_out)}
    metrics = trainer.evaluate()
    if spec.algorithm == "sft":
        return {"heldout": metrics["eval_loss"]}
    return {
        "heldout": metrics["eval_rewards/accuracies"],
        "heldout_margin": metrics["eval_rewards/margins"],
    }


def generation(trainer: Any) -> dict[str, float | None]:
    """Seconds of greedy decoding as trained, and with an adapter beside the weights merged."""
    model = trainer.model
    mergeable = hasattr(model, "merge_adapter") and not flush_seconds(model)
    seconds: dict[str, float | None] = {
        "generation_seconds": generate(trainer),
        "generation_merged_seconds": None,
    }
    if mergeable:
        model.merge_adapter()
        seconds["generation_merged_seconds"] = generate(trainer)
        model.unmerge_adapter()
    return seconds


@torch.no_grad()
def generate(trainer: Any) -> float:
    """Median seconds of a few tokens for a few rows."""
    tokenizer = trainer.processing_class
    batch = tokenizer(["1+2="] * GENERATE_ROWS, return_tensors="pt").to(trainer.model.device)
    batch.pop("token_type_ids", None)
    trainer.model.eval()
    seconds = []
    for _ in range(1 + GENERATE_TIMES):
        start = time.perf_counter()
        with trainer.accelerator.autocast():
            trainer.model.generate(
                **batch,
                min_new_tokens=GENERATED,
                max_new_tokens=GENERATED,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def saved_bytes(trainer: Any, directory: Path) -> int:
    """Size of the weights a checkpoint would have."""
    trainer.save_model(str(directory))
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
