"""The RL examples' task: its split, its reward, its measure."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.training_helpers import tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def sum_task():
    pytest.importorskip("reasoning_gym")
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("sum_task")
    finally:
        sys.path.remove(str(EXAMPLES))


def test_splits_are_disjoint_complete_and_right(sum_task) -> None:
    train, held_out = sum_task.problems("train", 100), sum_task.problems("heldout", 100)
    prompts = [prompt for prompt, _ in train + held_out]
    assert len(set(prompts)) == 200
    for prompt, answer in train + held_out:
        first, sign, second = prompt.removeprefix("Sums: ").removesuffix(" =").split()
        assert int(answer) == int(first) + int(sign + second)
    assert sum_task.problems("heldout", 7) == held_out[:7]


def test_bad_splits_and_counts(sum_task) -> None:
    with pytest.raises(ValueError, match=r"expected one of .*, found 'test'"):
        sum_task.problems("test", 1)
    with pytest.raises(ValueError, match="expected at most 100 train problems, found 101"):
        sum_task.problems("train", 101)


@pytest.mark.parametrize(
    ("completion", "earned"), [(" 11", 1.0), ("11", 1.0), (" 11.", 0.0), (" 1", 0.0), ("", 0.0)]
)
def test_reward_is_for_the_number_and_nothing_else(sum_task, completion, earned) -> None:
    assert sum_task.reward([completion], ["11"], prompts=["Sums: 3 + 8 ="]) == [earned]


def test_accuracy_is_that_of_the_greedy_completion(sum_task) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).train()
    prompts = ["w3 w1", "w2 w2 w7 w5"]  # of unlike lengths, so that one is padded
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(sum_task.COMPLETION_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        width = len(prompt.split())
        answers.append(tokenizer.decode(ids[0, width:], skip_special_tokens=True))

    right = list(zip(prompts, answers, strict=True))
    wrong = [(prompts[0], answers[0] + " w1")]
    assert sum_task.exact_accuracy(model, tokenizer, right) == 1.0
    assert sum_task.exact_accuracy(model, tokenizer, right + wrong) == pytest.approx(2 / 3)
    assert model.training
