"""AsyncGRPOTrainer up to its transport: what it would send to vLLM. The rest of it wants a GPU."""

import os
import time
from collections import defaultdict
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import peft
import pytest
import torch
from accelerate import PartialState

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.async_grpo import AsyncGRPOConfig
from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer

from subnet_ft import SubnetCallback, SubnetConfig
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.errors import ConfigError
from tests.helpers import assert_same_bits, random_mask, snapshot, tiny_llama, tokens


class Transport:
    """A `weight_transfer` that keeps what it is sent, in the order of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.sent: dict[str, torch.Tensor] = {}

    def pause(self) -> None:
        self.calls.append("pause")

    def send_weights(self, iterator: Any) -> None:
        self.calls.append("send")
        self.sent = {name: tensor.clone() for name, tensor in iterator}

    def resume(self) -> None:
        self.calls.append("resume")


def synced(model: Any) -> Transport:
    """Run TRL's own weight sync on a model, as rank 0 of one process."""
    PartialState(cpu=True)  # accelerate's logger asks for it
    transport = Transport()
    accelerator = MagicMock(is_main_process=True, device=torch.device("cpu"))
    accelerator.unwrap_model = lambda wrapped: wrapped
    trainer = SimpleNamespace(
        accelerator=accelerator,
        model=model,
        weight_transfer=transport,
        rollout_worker=None,
        model_version=0,
        _metrics={"train": defaultdict(list)},
    )
    trainer._streaming_iter = MethodType(AsyncGRPOTrainer._streaming_iter, trainer)
    AsyncGRPOTrainer._sync_weight_merged(trainer, time.time())
    return transport


def test_sends_whole_weights_under_the_base_s_names_and_trains_on() -> None:
    base = snapshot(tiny_llama())
    mask = random_mask(tiny_llama(), 0.1)
    model = peft.get_peft_model(tiny_llama(), SubnetConfig(mask=mask))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        transport = synced(model)
        assert transport.calls == ["pause", "send", "resume"]
        assert transport.sent.keys() == base.keys()
        for layer in sidecar_layers(model):
            weight, indices = transport.sent[layer.name], mask[layer.name].long()
            assert_same_bits(weight.flatten()[indices], layer.subnets()[0].values, layer.name)
            assert_same_bits(weight, layer.weight, layer.name)  # still live after the sync
        assert not torch.equal(transport.sent["model.norm.weight"], base["model.norm.weight"])


def test_the_callback_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    args = AsyncGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match="AsyncGRPOTrainer"):
        SubnetCallback(random_mask(model)).on_init_end(
            args,
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            model=model,
        )
