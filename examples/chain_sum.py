"""Preference pairs from reasoning-gym's `chain_sum`: the right sum against a near miss.

    python examples/chain_sum.py

prints three pairs.
"""

import random

import reasoning_gym
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Given explicitly because SmolLM2's chat template otherwise adds a longer one to every prompt.
SYSTEM = {"role": "system", "content": "You solve sums."}
OFFSETS = [-10, -2, -1, 1, 2, 10]
HELD_OUT = 96

Message = dict[str, str]
Pair = dict[str, list[Message]]


def training_pairs(count: int) -> list[Pair]:
    """Returns `count` pairs, none of them held out."""
    return preference_pairs(HELD_OUT + count)[HELD_OUT:]


def heldout_pairs() -> list[Pair]:
    """Returns the held-out pairs, the same whatever is trained on."""
    return preference_pairs(HELD_OUT)


def preference_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Returns `count` pairs, no expression twice, in TRL's conversational preference format.

    More pairs of a seed begin with the fewer ones. Sets for training and for testing are slices of
    one call: neighbouring seeds overlap, since reasoning-gym seeds item i with `seed + i`.

    Args:
        count: How many pairs.
        seed: Seeds both the expressions and the near misses.
    """
    problems = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=4 * count, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    rng = random.Random(seed)
    pairs: dict[str, Pair] = {}
    for problem in problems:
        expression = problem["metadata"]["expression"]
        if expression in pairs:
            continue
        right = int(problem["answer"])
        near_miss = right + rng.choice(OFFSETS)
        # Repeating the expression is what lets a model this small know the sum at all: untrained,
        # it prefers the right one in five pairs of six, but in half where the sum stands alone.
        pairs[expression] = {
            "prompt": [SYSTEM, {"role": "user", "content": f"What is {expression}?"}],
            "chosen": [{"role": "assistant", "content": f"{expression} = {right}"}],
            "rejected": [{"role": "assistant", "content": f"{expression} = {near_miss}"}],
        }
        if len(pairs) == count:
            return list(pairs.values())
    raise ValueError(f"expected {count} different expressions, found {len(pairs)}")


@torch.no_grad()
def completion_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    side: str,
    batch_size: int = 16,
) -> torch.Tensor:
    """Returns log p(completion | prompt) of every pair's `side`, summed over its tokens.

    Args:
        model: A decoder with `model.model` and `model.lm_head`.
        tokenizer: Its tokenizer, with a chat template.
        pairs: The pairs.
        side: "chosen" or "rejected".
        batch_size: Sequences a forward.

    Returns:
        float32, one entry a pair.
    """
    sums = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        prompts = [
            _token_ids(tokenizer, pair["prompt"], add_generation_prompt=True) for pair in batch
        ]
        rows = [_token_ids(tokenizer, pair["prompt"] + pair[side]) for pair in batch]
        width = max(map(len, rows))
        tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tokens[i, : len(row)] = torch.tensor(row)
            scored[i, len(prompt) : len(row)] = True
        attended = torch.arange(width) < torch.tensor([[len(row)] for row in rows])

        hidden = model.model(tokens, attention_mask=attended.long()).last_hidden_state
        # The head's 49152 columns are the dear part: only answers pass through it.
        before = scored[:, 1:]
        logprobs = model.lm_head(hidden[:, :-1][before]).float().log_softmax(-1)
        picked = logprobs.gather(1, tokens[:, 1:][before][:, None])[:, 0]
        sums.append(torch.zeros(before.shape).masked_scatter_(before, picked).sum(1))
    return torch.cat(sums)


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool = False
) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )


if __name__ == "__main__":
    for pair in preference_pairs(3):
        print(f"{pair['chosen'][0]['content']}, not {pair['rejected'][0]['content']}")
