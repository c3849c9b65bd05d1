"""Every trainer with the subnetwork in three ways, with and without gradient checkpointing.

One test a cell of docs/trainers.md; at the end that page is held to what was found. After a change
write it anew: `SUBNET_FT_UPDATE_DOCS=1 pytest tests/test_trainers.py`.
"""

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from trl import DPOConfig, DPOTrainer

from subnet_ft import SubnetCallback, SubnetConfig
from subnet_ft.adapter.inject import base_parameters, sidecar_layers
from subnet_ft.errors import ConfigError
from tests.helpers import assert_same_bits, random_mask
from tests.trainer_table import Cell, page
from tests.trainers import (
    CHECKPOINTING,
    LEFT_OUT,
    NOT_POSSIBLE,
    REFERENCE,
    TRAINERS,
    WAYS,
    model_for,
)
from tests.training_helpers import preference_dataset, tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"
FOUND: dict[Cell, str] = {}
POSSIBLE = [
    (name, way, kind)
    for name in TRAINERS
    for way in WAYS
    for kind in CHECKPOINTING
    if (name, way) not in NOT_POSSIBLE
]


def weights_of(root: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the base's own parameters, whatever PEFT put around the model."""
    root = getattr(root, "get_base_model", lambda: root)()
    return {
        name: owners[0][0]._parameters[owners[0][1]].detach().clone()  # type: ignore[union-attr]
        for name, owners in base_parameters(root).items()
    }


def values_of(root: nn.Module) -> dict[str, torch.Tensor]:
    return {
        layer.name: subnet.values.detach().clone()
        for layer in sidecar_layers(root)
        if (subnet := layer.subnet("default")) is not None
    }


class Witness:
    """Notes at every forward pass whether the model then was the base, bit for bit."""

    def __init__(self, trainer: Any, base: dict[str, torch.Tensor]) -> None:
        self.trainer, self.base = trainer, base
        self.as_base: list[tuple[int, bool]] = []  # (steps done, was the base)
        root = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
        root.get_input_embeddings().register_forward_pre_hook(self._look)
        self.root = root

    def _look(self, *_: Any) -> None:
        now = weights_of(self.root)
        same = all(torch.equal(now[name], weight) for name, weight in self.base.items())
        self.as_base.append((self.trainer.state.global_step, same))

    def reference(self) -> str:
        """Say how the reference was had; fail if it was not the base."""
        second = getattr(self.trainer, "ref_model", None)
        if second is not None:
            for name, weight in weights_of(second).items():
                assert_same_bits(weight, self.base[name], f"reference model, {name}")
            return "second model"
        if getattr(self.trainer, "precompute_ref_logps", False):
            assert self.as_base[0] == (0, True)
            return "before training"
        assert (1, True) in self.as_base, "after a step no pass ran on the base"
        return "same model"


def run(cell: Cell, directory: Path, resume: str | None = None) -> Any:
    """Make the cell's trainer, look over its shoulder, and train it."""
    name, way, kind = cell
    model = model_for(name, directory / "base")
    left_out = LEFT_OUT.get(name)
    base, mask = weights_of(model), random_mask(model, 0.1)
    whole = ["score"] if left_out == "score.weight" else None
    config = SubnetConfig(mask=mask, exclude=left_out, modules_to_save=whole)
    how: dict[str, Any] = {}
    if way == "peft_config":
        how = {"peft_config": config}
    elif way == "wrapped":
        model = peft.get_peft_model(model, config)
    else:
        how = {"callbacks": [SubnetCallback(config)]}
    trainer = TRAINERS[name](model, directory, CHECKPOINTING[kind], **how)
    witness = Witness(trainer, {key: weight for key, weight in base.items() if key != left_out})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, witness, mask


@pytest.mark.parametrize("cell", POSSIBLE, ids=lambda cell: "-".join(cell))
def test_trains(cell: Cell, tmp_path: Path) -> None:
    trainer, witness, mask = run(cell, tmp_path / "run")
    trained, values = weights_of(trainer.model), values_of(trainer.model)
    assert values.keys() == witness.base.keys()
    moved = 0
    for name, before in witness.base.items():
        kept = torch.ones(before.numel(), dtype=torch.bool)
        kept[mask[name].long()] = False
        weight = trained[name].flatten()
        assert_same_bits(weight[kept], before.flatten()[kept], name)
        assert_same_bits(weight[~kept], values[name].to(weight.dtype), name)
        moved += not torch.equal(weight[~kept], before.flatten()[~kept])
    assert moved > len(values) // 2, "most tensors should have moved"
    reference = witness.reference() if cell[0] in REFERENCE else ""

    resumed, _, _ = run(cell, tmp_path / "resumed", str(tmp_path / "run" / "checkpoint-1"))
    for name, found in values_of(resumed.model).items():
        assert_same_bits(values[name], found, f"resumed, {name}")
    FOUND[cell] = f"yes, {reference}" if reference else "yes"


@pytest.mark.parametrize(("name", "way"), NOT_POSSIBLE, ids="-".join)
def test_says_why_not(name: str, way: str, tmp_path: Path) -> None:
    error, message, _ = NOT_POSSIBLE[name, way]
    with pytest.raises(error, match=message):
        run((name, way, "plain"), tmp_path)


@pytest.fixture(scope="module", autouse=True)
def the_page_says_so() -> Iterator[None]:
    """Hold docs/trainers.md to what this run found, or write it."""
    yield
    if len(FOUND) == len(POSSIBLE):
        names = ("trl", "transformers", "peft", "torch")
        versions = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
        found = page(FOUND, versions)
        if os.environ.get("SUBNET_FT_UPDATE_DOCS"):
            PAGE.parent.mkdir(exist_ok=True)
            PAGE.write_text(found)
        assert PAGE.read_text() == found, "docs/trainers.md says something else"


def test_a_reference_that_follows_is_refused_with_the_callback(tmp_path: Path) -> None:
    model = model_for("DPO", tmp_path / "base")
    args = DPOConfig(str(tmp_path), sync_ref_model=True, use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match="sync_ref_model=False"):
        DPOTrainer(
            model,
            args=args,
            train_dataset=preference_dataset(),
            processing_class=tiny_tokenizer(),
            callbacks=[SubnetCallback(random_mask(model))],
        )
