"""One DPO run of the quickstart, in a process of its own so that its memory is its own.

    python examples/quickstart_run.py OUTPUT --base DIR [--mask FILE] [--dtype bfloat16]

Without `--mask` every weight is trained and the reference model is a second copy, as TRL does by
default; with it only the mask's weights are, and the reference is the same model with the adapter
switched off. Nothing else differs. Expected last line: `<name>: done in <seconds> s, ...`.
"""

import argparse
import json
import re
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from chain_sum import training_pairs
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from subnet_ft import SubnetConfig

SEED = 0
BATCH_SIZE = 4
BETA = 0.1
WARMUP_STEPS = 2  # left out of the step time: the first steps allocate
FINAL_STEPS = 5  # `final_loss` is the mean over the last so many steps


def main() -> None:
    """Trains, then writes checkpoint, final bf16 weights and `run.json` into the output folder."""
    options = parse_options()
    rss_after_imports = psutil.Process().memory_info().rss
    name = options.output.name
    started = time.perf_counter()

    clock = Clock(name, options.steps)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.base, dtype=options.dtype),
        args=training_arguments(options),
        train_dataset=Dataset.from_list(training_pairs(options.steps * BATCH_SIZE)),
        processing_class=AutoTokenizer.from_pretrained(options.base),
        peft_config=SubnetConfig(mask=options.mask, clip=options.clip) if options.mask else None,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    peak_rss = peak_rss_bytes()  # before the merge below adds its own

    trainer.save_model()
    trainer.save_state()
    save_final_weights(trainer.model, options.output / "final")

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {
        "losses": losses,
        "final_loss": statistics.fmean(losses[-FINAL_STEPS:]),
        "peak_rss_bytes": peak_rss,
        "rss_after_imports_bytes": rss_after_imports,
        "trainable_parameters": trainable_parameters(trainer),
        "optimizer_bytes": optimizer_bytes(trainer.optimizer),
        "checkpoint_bytes": sum(f.stat().st_size for f in options.output.glob("*.safetensors")),
        "seconds_per_step": statistics.median(clock.seconds[WARMUP_STEPS:] or clock.seconds),
        "settings": settings(trainer.args, options),
    }
    (options.output / "run.json").write_text(json.dumps(figures, indent=2) + "\n")
    took = time.perf_counter() - started
    print(f"{name}: done in {took:.0f} s, final loss {figures['final_loss']:.4f}", flush=True)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of this run; its name is the run's")
    parser.add_argument("--base", type=Path, required=True, help="model directory to start from")
    parser.add_argument("--mask", type=Path, help="mask file; without it everything is trained")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clip", choices=["compact", "dense"], default="dense")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    return parser.parse_args()


def training_arguments(options: argparse.Namespace) -> DPOConfig:
    """What all runs share."""
    return DPOConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=BETA,
        bf16=True,  # autocast; the weights keep the dtype they were loaded in
        use_cpu=True,
        gradient_checkpointing=False,  # it saves activations, of which there are few here
        seed=SEED,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )


def settings(args: DPOConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What to write beside the figures."""
    return {
        "steps": args.max_steps,
        "batch_pairs": args.per_device_train_batch_size,
        "learning_rate": args.learning_rate,
        "schedule": args.lr_scheduler_type.value,
        "optimizer": args.optim.value,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "beta": args.beta,
        "seed": args.seed,
        "weights_dtype": options.dtype,
        "autocast": "bfloat16",
        "gradient_norm_for_clipping": options.clip if options.mask else "dense",
        "reference": "the same model, adapter off" if options.mask else "a second model",
        "final_loss_is_mean_of_last_steps": FINAL_STEPS,
        "steps_left_out_of_step_time": WARMUP_STEPS,
    }


class Clock(TrainerCallback):
    """Times each step and says now and then how far the run is."""

    def __init__(self, name: str, steps: int) -> None:
        """Starts with no steps."""
        self.name, self.steps = name, steps
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        """Starts the watch."""
        self.started = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Stops the watch."""
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs=None, **kwargs: object) -> None:
        """Prints every fifth step."""
        if "loss" in logs and state.global_step % 5 == 0:
            step = f"step {state.global_step:3}/{self.steps}"
            print(f"  {self.name}: {step}, loss {logs['loss']:.4f}", flush=True)


def save_final_weights(model: torch.nn.Module, directory: Path) -> None:
    """Writes the trained model as an ordinary bf16 model directory."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(directory)


def trainable_parameters(trainer: DPOTrainer) -> int:
    """How many numbers the optimizer moves."""
    return sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Summed storages of the optimizer's state."""
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    return sum(v.untyped_storage().nbytes() for v in tensors if isinstance(v, torch.Tensor))


def peak_rss_bytes() -> int:
    """The most memory this process has held at once."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count the parent's peak before exec as ours
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    logging.disable_progress_bar()
    main()
