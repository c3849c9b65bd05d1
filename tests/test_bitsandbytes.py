"""Every elementwise bitsandbytes optimizer on compact values, and its options for one weight."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from trl import SFTConfig, SFTTrainer

from subnet_ft import SubnetConfig, SubnetError
from subnet_ft.adapter.inject import sidecar_layers
from tests.helpers import (
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    snapshot,
    tiny_llama,
    tokens,
)
from tests.training_helpers import arguments, text_dataset, tiny_tokenizer

bnb = pytest.importorskip("bitsandbytes")

CLASSES = {
    name: cls
    for name, cls in vars(bnb.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
}
SHAPE_DEPENDENT = [name for name in CLASSES if "LAMB" in name or "LARS" in name]
# Their state has the wrong shape in 0.50.2; AdEMAMix and PagedAdEMAMix are the same optimizers.
BROKEN = ["AdEMAMix32bit", "PagedAdEMAMix32bit"]
ELEMENTWISE = [name for name in CLASSES if name not in SHAPE_DEPENDENT + BROKEN]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 1e-2, "momentum": 0.9}}
DENSITY = 0.7  # the larger weights keep over 4096 entries, below which state stays 32-bit
ON_CPU = "ignore:Paged optimizers are not supported on CPU"


@pytest.fixture(autouse=True)
def fresh_manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """bitsandbytes never forgets: what a run registers would hold for the next one's parameters."""
    monkeypatch.setattr(bnb.optim.GlobalOptimManager, "_instance", None)
    yield


def make(name: str, parameters: Any) -> torch.optim.Optimizer:
    family = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    options = OPTIONS.get(family, {"lr": 1e-2})
    return CLASSES[name](parameters, weight_decay=0.1, **options)


def masked(density: float = DENSITY, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = tiny_llama(dtype)
    return peft.get_peft_model(model, SubnetConfig(mask=random_mask(model, density)))


def trainable(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        ids = tokens(seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(optimizer: torch.optim.Optimizer, values: torch.Tensor) -> int:
    return 8 * int(optimizer.state[values]["state1"].element_size())


def test_the_list_is_whole() -> None:
    families = ["Adagrad", "RMSprop", "SGD"]
    paged = ["Adam", "AdamW", "Lion", "AdEMAMix"]
    names = families + paged + [f"Paged{name}" for name in paged]
    known = {f"{name}{size}" for name in names for size in ("", "8bit", "32bit")}
    assert {*ELEMENTWISE, *BROKEN} == known


@pytest.mark.filterwarnings(ON_CPU)
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_left_out_cannot_step_a_dense_model_either(name: str) -> None:
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="shape"):
        train(model, make(name, model.parameters()))


@pytest.mark.filterwarnings(ON_CPU)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_it_steps_the_values_and_nothing_else(name: str) -> None:
    model = masked()
    before = [values.detach().clone() for values in trainable(model)]
    optimizer = make(name, trainable(model))
    train(model, optimizer)
    for layer, start in zip(sidecar_layers(model), before, strict=True):
        (subnet,) = layer.subnets()
        assert not torch.equal(subnet.values, start), layer.name
        held = layer.weight.flatten()[subnet.indices]
        assert_same_bits(held, subnet.values.detach().to(held.dtype), layer.name)
        large = subnet.values.numel() >= 4096
        assert bits(optimizer, subnet.values) == (8 if "8bit" in name and large else 32)
    base = tiny_llama(torch.bfloat16)
    after = snapshot(model.get_base_model())
    assert_off_mask_untouched(snapshot(base), after, random_mask(base, DENSITY))


@pytest.mark.filterwarnings(ON_CPU)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_density_one_is_the_dense_optimizer(name: str) -> None:
    """In fp32; four kinds of weight have 4096 elements or more, and 8-bit state."""
    dense, model = tiny_llama(), masked(1.0, torch.float32)
    optimizer = make(name, dense.parameters())
    train(dense, optimizer)
    train(model, make(name, trainable(model)))
    weights = dict(dense.named_parameters())
    for layer in sidecar_layers(model):
        assert_same_bits(layer.weight.detach(), weights[layer.name].detach(), layer.name)
    small = {bits(optimizer, weight) for weight in weights.values() if weight.numel() >= 4096}
    assert small == ({8} if "8bit" in name else {32})


@pytest.mark.parametrize("name", SHAPE_DEPENDENT)
def test_layerwise_optimizers_are_refused(name: str) -> None:
    model = masked()
    before = snapshot(model)
    options = {"momentum": 0.9} if "LARS" in name else {}
    optimizer = CLASSES[name](trainable(model), lr=1e-2, **options)
    with pytest.raises(SubnetError, match=f"{name}, whose update depends on the shape"):
        train(model, optimizer, steps=1)
    for key, weight in snapshot(model).items():
        assert_same_bits(weight, before[key], key)


def test_blocks_are_256_entries_in_a_row() -> None:
    """Entries of the mask, wherever in the weight they lie."""
    model = masked()
    optimizer = bnb.optim.AdamW8bit(trainable(model), min_8bit_size=1)
    train(model, optimizer, steps=1)
    for values in trainable(model):
        assert optimizer.state[values]["state1"].shape == values.shape
        assert optimizer.state[values]["absmax1"].numel() == math.ceil(values.numel() / 256)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_density_one_through_a_trainer_is_full_8bit_finetuning(tied: bool, tmp_path: Path) -> None:
    """The Trainer asks for 32-bit state of embeddings, naming their weights."""

    def run(config: SubnetConfig | None) -> tuple[dict[str, torch.Tensor], set[int]]:
        bnb.optim.GlobalOptimManager._instance = None
        trainer = SFTTrainer(
            tiny_llama(tied=tied),
            arguments(tmp_path, SFTConfig, optim="adamw_bnb_8bit"),
            train_dataset=text_dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=config,
        )
        trainer.train()
        optimizer, model = trainer.optimizer.optimizer, trainer.model
        wide = {
            p.numel()
            for p in optimizer.state
            if bits(optimizer, p) == 32 and p.numel() >= 4096  # 32-bit by request
        }
        return snapshot(model if config is None else model.merge_and_unload()), wide

    full, full_wide = run(None)
    found, wide = run(SubnetConfig(density=1.0, include="all"))
    assert wide == full_wide == {96 * 64}  # the embedding, tied or not, and no other
    assert full.keys() == found.keys()
    for name, weight in full.items():
        assert_same_bits(weight, found[name], name)


def test_what_is_registered_for_a_weight_holds_for_its_values() -> None:
    model = masked()
    manager = bnb.optim.GlobalOptimManager.get_instance()
    up = model.get_base_model().model.layers[0].mlp.up_proj
    manager.register_module_override(up, "weight", {"optim_bits": 32, "lr": 0.0})
    optimizer = bnb.optim.AdamW8bit(trainable(model))
    before = [values.detach().clone() for values in trainable(model)]
    train(model, optimizer, steps=1)
    for layer, start in zip(sidecar_layers(model), before, strict=True):
        (values,) = (subnet.values for subnet in layer.subnets())
        exempt = layer.name == "model.layers.0.mlp.up_proj.weight"
        assert bits(optimizer, values) == (32 if exempt or values.numel() < 4096 else 8)
        assert torch.equal(values, start) == exempt, layer.name


def test_an_override_of_the_values_themselves_holds() -> None:
    model = masked()
    exempt = max(trainable(model), key=torch.Tensor.numel)
    optimizer = bnb.optim.AdamW8bit(trainable(model))
    bnb.optim.GlobalOptimManager.get_instance().override_config(exempt, "optim_bits", 32)
    train(model, optimizer, steps=1)
    for values in trainable(model):
        assert bits(optimizer, values) == (32 if values.numel() < 4096 or values is exempt else 8)
