"""PPO, PRIME and rejection sampling: their formulas against slow ones, and that they learn."""

import argparse
import importlib
import sys
from pathlib import Path

import peft
import pytest
import torch

from subnet_ft import SubnetConfig
from tests.helpers import assert_off_mask_untouched, assert_same_bits, random_mask, tiny_llama
from tests.training_helpers import WORDS, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
PROBLEMS = [(f"{WORDS[i]} {WORDS[-i]} w7"[: 8 if i % 2 else None], "low") for i in range(1, 41)]


@pytest.fixture(scope="module", autouse=True)
def on_path():
    pytest.importorskip("reasoning_gym")
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def example(name: str):
    return importlib.import_module(name)


def low_first(completions: list[str], answers: list[str]) -> list[float]:
    """1 for a completion whose first word is one of the 45 low ones: half of them, by chance."""
    words = [text.split()[:1] for text in completions]
    return [float(bool(w) and w[0] != "<unk>" and int(w[0][1:]) < 45) for w in words]


def policy(
    density: float = 0.1,
) -> tuple[peft.PeftModel, dict[str, torch.Tensor], argparse.Namespace]:
    """A tiny model with a subnetwork, its weights before, and a command line to match."""
    base = tiny_llama()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    mask = random_mask(base, density)
    model = peft.get_peft_model(base, SubnetConfig(mask=mask), adapter_name="policy")
    options = argparse.Namespace(mask=mask, full=False, steps=12, learning_rate=1e-2, rounds=4)
    return model.eval(), before, options


def weights(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    named = model.get_base_model().named_parameters()
    return {name: p.detach() for name, p in named if "subnet_ft_values" not in name}


def drawn(rows: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers for tokens, and masks of answers of every length."""
    lengths = torch.arange(rows) % width + 1
    return torch.randn(rows, width), torch.arange(width) < lengths[:, None]


def test_sampled_tokens_have_the_probability_they_were_drawn_with() -> None:
    rollouts = example("rollouts")
    model, _, _ = policy()
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(8)  # far from uniform
    drawn = rollouts.sample(model, tokenizer, ["w1 w2 w3", "w4"], 200, 4)
    logprobs = rollouts.fixed_logprobs(model, drawn)
    # The importance-weighted estimate of any event is its share: here, of the commonest token.
    first = drawn.completions[:200, 0]
    common = first.mode().values
    share = (first == common).float().mean()
    assert logprobs[:200, 0][first == common][0].exp() == pytest.approx(share.item(), abs=0.11)
    # One by one and without padding, the model gives the same.
    for row in (0, 399):
        alone = drawn.tokens[row][drawn.attended[row]]
        count = int(drawn.sampled[row].sum())
        expected = model(alone[None]).logits[0, :-1].log_softmax(-1).gather(1, alone[1:, None])
        torch.testing.assert_close(logprobs[row, :count], expected[-count:, 0], atol=1e-4, rtol=0)
    again = rollouts.token_logprobs(model, drawn)
    torch.testing.assert_close((again - logprobs).exp(), torch.ones_like(logprobs))


def test_the_end_is_sampled_and_what_follows_is_not() -> None:
    rollouts = example("rollouts")
    model, _, _ = policy()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # as many chat models have it
    drawn = rollouts.sample(model, tokenizer, ["w1"] * 4, 100, 12)
    end = tokenizer.eos_token_id
    ended = [row for row in range(400) if end in drawn.completions[row]]
    assert ended
    for row in ended:
        length = drawn.completions[row].tolist().index(end) + 1
        assert drawn.sampled[row].tolist() == [i < length for i in range(12)]


def test_gae_is_the_sum_of_discounted_surprises(monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = example("ppo")
    monkeypatch.setattr(ppo, "DISCOUNT", 0.9)
    (rewards, mask), values = drawn(), torch.randn(6, 5)
    advantages, returns = ppo.gae(rewards * mask, values, mask)
    for row in range(6):
        length = int(mask[row].sum())
        v = [*values[row, :length].tolist(), 0.0]
        surprises = [rewards[row, t].item() + 0.9 * v[t + 1] - v[t] for t in range(length)]
        for t in range(5):
            decay = 0.9 * ppo.GAE_LAMBDA
            slow = sum(decay ** (s - t) * surprises[s] for s in range(t, length))
            assert advantages[row, t].item() == pytest.approx(slow, abs=1e-5)
            expected = slow + v[t] if t < length else 0.0
            assert returns[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_the_last_token_earns_the_reward_and_every_token_pays_for_the_kl() -> None:
    ppo = example("ppo")
    kl, mask = drawn()
    rewards = ppo.token_rewards(torch.ones(6), kl, mask) + ppo.KL_WEIGHT * kl * mask
    assert rewards.sum(1).tolist() == pytest.approx([1.0] * 6)
    assert rewards.argmax(1).tolist() == (mask.sum(1) - 1).tolist()


def test_values_gain_nothing_beyond_the_clip() -> None:
    ppo = example("ppo")
    far = torch.tensor([[0.5]], requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    ppo.clipped_value_loss(far, torch.zeros(1, 1), torch.ones(1, 1), one).backward()
    assert far.grad.item() == 0.0  # on its way to 1, but already past 0.2


def test_whitened_advantages() -> None:
    rollouts = example("rollouts")
    values, mask = drawn()
    white = rollouts.whiten(5 * values + 3, mask)
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white[mask].std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert not white[~mask].any()


def test_leave_one_out_against_a_loop() -> None:
    prime = example("prime")
    k = prime.COMPLETIONS
    process, mask = drawn(rows=3 * k)
    process, outcomes = process * mask, torch.randint(0, 2, (3 * k,)).float()
    advantages = prime.leave_one_out(process, outcomes, mask)
    lengths = mask.sum(1).tolist()
    for i in range(3 * k):
        others = [j for j in range(i - i % k, i - i % k + k) if j != i]
        of_process = sum(process[j].sum().item() / lengths[j] for j in others) / (k - 1)
        of_outcomes = sum(outcomes[j].item() for j in others) / (k - 1)
        for t in range(lengths[i]):
            steps = [process[i, s].item() - of_process for s in range(t, lengths[i])]
            expected = sum(steps) + outcomes[i].item() - of_outcomes
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-5)
        assert not advantages[i, lengths[i] :].any()


def test_process_rewards_sum_to_the_log_ratio_of_the_whole_answer() -> None:
    rollouts, prime = example("rollouts"), example("prime")
    model, _, options = policy()
    model.add_adapter("prm", SubnetConfig(mask=options.mask))
    model.set_adapter("prm")
    batch = rollouts.sample(model, tiny_tokenizer(), ["w1 w2", "w3"], 4, 6)
    reference = rollouts.fixed_logprobs(model, batch, reference=True)
    assert not prime.process_rewards(model, batch, reference).any()  # a PRM starts as the reference

    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.base_model.flush()
    rewards = prime.process_rewards(model, batch, reference).sum(1)
    for row in range(len(batch)):
        tokens = batch.tokens[row][batch.attended[row]]
        count = int(batch.sampled[row].sum())

        def of_answer(tokens: torch.Tensor = tokens, count: int = count) -> float:
            logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
            return logprobs.gather(1, tokens[1:, None])[-count:].sum().item()

        log_ratio = of_answer()
        with model.disable_adapter():
            log_ratio -= of_answer()
        assert abs(log_ratio) > 1e-2
        assert rewards[row].item() == pytest.approx(prime.BETA * log_ratio, abs=1e-4)


def test_prompts_too_easy_or_too_hard_are_left_out() -> None:
    prime = example("prime")
    outcomes = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1]]).float()
    assert prime.of_middling_prompts(outcomes.flatten()).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_only_right_answers_are_kept_and_each_once() -> None:
    rft, rollouts = example("rft"), example("rollouts")
    tokens = torch.tensor([[1, 5], [1, 6], [1, 5], [2, 5], [1, 7]])
    batch = rollouts.Rollouts(tokens, tokens > 0, tokens[:, 1:] > 0, list("abcde"))
    earned = [1.0, 0.0, 1.0, 1.0, 0.5]
    assert rft.right_ones(batch, earned, once=True).tolist() == [0, 3]
    assert rft.right_ones(batch, earned, once=False).tolist() == [0, 2, 3]


def test_a_round_without_a_right_answer_changes_nothing() -> None:
    rft = example("rft")
    model, before, options = policy()
    figures = list(
        rft.train(model, tiny_tokenizer(), PROBLEMS, lambda texts, _: [0.0] * len(texts), options)
    )
    assert [f["kept"] for f in figures] == [0] * options.rounds
    for name, weight in weights(model).items():
        assert_same_bits(before[name], weight, name)


@pytest.mark.parametrize("name", ["ppo", "prime", "rft"])
def test_it_learns_and_leaves_alone_what_is_not_masked(name: str) -> None:
    model, before, options = policy()
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    rollouts = example("rollouts")

    def share() -> float:
        texts = rollouts.sample(model, tokenizer, [p for p, _ in PROBLEMS], 20, 4).texts
        return sum(low_first(texts, [])) / len(texts)

    start = share()
    options.steps = 20
    list(example(name).train(model, tokenizer, PROBLEMS, low_first, options))
    assert share() > start + 0.05  # two standard errors of the difference
    after = weights(model)
    assert_off_mask_untouched(before, after, options.mask)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    with model.disable_adapter():
        for key, weight in weights(model).items():
            assert_same_bits(before[key], weight, key)


def test_one_round_is_plain_rejection_sampling() -> None:
    rft = example("rft")
    model, before, options = policy()
    options.rounds, options.steps = 1, None
    (figures,) = rft.train(model, tiny_tokenizer(), PROBLEMS, low_first, options)
    assert 0.3 < figures["reward"] < 0.7 and figures["kept"] > 0
    assert_off_mask_untouched(before, weights(model), options.mask)


def test_full_finetuning_is_a_subnetwork_of_everything() -> None:
    rollouts, prime = example("rollouts"), example("prime")
    base = tiny_llama()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    options = argparse.Namespace(full=True, mask=None, steps=2, learning_rate=1e-2)
    model = peft.get_peft_model(base, rollouts.subnet(options), adapter_name="policy").eval()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(weight.numel() for weight in before.values())
    list(prime.train(model, tiny_tokenizer(), PROBLEMS, low_first, options))
    assert all(not torch.equal(before[name], weight) for name, weight in weights(model).items())
    with model.disable_adapter():
        for name, weight in weights(model).items():
            assert_same_bits(before[name], weight, name)
