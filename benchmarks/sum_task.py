"""What SmolLM2-135M-Instruct makes of examples/sum_task.py before any reward: format, or sums?

    python -m benchmarks.sum_task

Of the held-out problems, by greedy decoding: how many answers are exact, and in how many the first
number is right, whatever follows. Writes benchmarks/results/sum_task.json.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.optimizer import machine

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from smollm2 import model_directory
from sum_task import COMPLETION_TOKENS, HELD_OUT, Problem, problems, reward, warm_started

RESULTS = Path(__file__).parent / "results" / "sum_task.json"
WORD = "Sums: "


def main() -> None:
    """Measure both models, and the first without the word before the sum."""
    asked = problems("heldout", HELD_OUT)
    bare = [(prompt.removeprefix(WORD), answer) for prompt, answer in asked]
    results = {
        "machine": machine(),
        "problems": len(asked),
        "before the warm start": measure(model_directory(), asked),
        "before the warm start, without the word": measure(model_directory(), bare),
        "after it": measure(warm_started(), asked),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


@torch.no_grad()
def measure(directory: Path, asked: Sequence[Problem]) -> dict[str, Any]:
    """Return the share of exact answers, and of right first numbers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts, answers = zip(*asked, strict=True)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    tokens = model.generate(
        **batch,
        max_new_tokens=COMPLETION_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    width = batch["input_ids"].shape[1]
    completions = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    numbers = [re.search(r"-?\d+", completion) for completion in completions]
    first = sum(n is not None and n[0] == a for n, a in zip(numbers, answers, strict=True))
    return {
        "exact": sum(reward(completions, answers)) / len(asked),
        "first_number": first / len(asked),
    }


if __name__ == "__main__":
    main()
