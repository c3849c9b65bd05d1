"""Bad input to the API: one clear line, and a model that is as it was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from subnet_ft import SubnetCallback, SubnetConfig, SubnetError
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.mask import SubnetMask
from tests.helpers import as_integers, random_mask, shapes_of, snapshot, tiny_llama, tokens
from tests.training_helpers import arguments, stock_trainer


def attach(model: Any = None, **config: Any) -> Any:
    model = tiny_llama() if model is None else model
    return peft.get_peft_model(model, SubnetConfig(**({"mask": random_mask(model)} | config)))


def mask_of_another_model(tmp_path: Path) -> None:
    attach(mask=SubnetMask({"layers.9.weight": torch.tensor([1])}, {"layers.9.weight": (2, 2)}))


def mask_of_another_shape(tmp_path: Path) -> None:
    attach(mask=SubnetMask.synthetic({"model.norm.weight": (32,)}, 0.5))


def empty_mask(tmp_path: Path) -> None:
    attach(mask=SubnetMask({}, shapes_of(tiny_llama())))


def base_edited_in_one_covered_weight(tmp_path: Path) -> None:
    model = attach()
    model.save_pretrained(tmp_path / "adapter")
    other = tiny_llama()
    index = random_mask(other)["model.norm.weight"][0].item()
    other.model.norm.weight.data.view(-1)[index] += 0.1
    peft.PeftModel.from_pretrained(other, tmp_path / "adapter")


def adapter_of_another_model(tmp_path: Path) -> None:
    attach().save_pretrained(tmp_path / "adapter")
    peft.PeftModel.from_pretrained(tiny_llama(vocab=97), tmp_path / "adapter")


def adapter_without_header(tmp_path: Path) -> None:
    attach().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "header" not in k}, file)
    peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)


def adapter_with_values_missing(tmp_path: Path) -> None:
    attach().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("subnet_ft_values.weight"))
    save_file({**tensors, key: tensors[key][1:]}, file)
    peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)


def unknown_selector(tmp_path: Path) -> None:
    SubnetConfig(selector="best")


def density_zero(tmp_path: Path) -> None:
    SubnetConfig(density=0.0)


def unknown_clip(tmp_path: Path) -> None:
    SubnetConfig(clip="none")


def target_modules(tmp_path: Path) -> None:
    SubnetConfig(target_modules=["q_proj"])


def layers_to_transform(tmp_path: Path) -> None:
    SubnetConfig(layers_to_transform=0)


def pattern_without_match(tmp_path: Path) -> None:
    attach(include="no_such_layer")


def pattern_that_is_no_regex(tmp_path: Path) -> None:
    attach(exclude="(")


def float8_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight.detach().to(torch.float8_e4m3fn)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    attach(model, mask=SubnetMask.synthetic({"0.weight": (4, 4)}, 0.5))


def quantized_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    attach(model, mask=SubnetMask.synthetic({"0.weight": (4, 4)}, 0.5))


def cast_after_attaching(tmp_path: Path) -> None:
    attach().to(torch.bfloat16)


def embeddings_resized_after_attaching(tmp_path: Path) -> None:
    model = attach()
    model.get_base_model().resize_token_embeddings(128)
    model(tokens())


def embeddings_untied_after_attaching(tmp_path: Path) -> None:
    model = attach()
    head = model.get_base_model().lm_head
    head.weight = nn.Parameter(torch.randn(96, 64))
    model(tokens())


def switched_between_forward_and_backward(tmp_path: Path) -> None:
    model = attach()
    model.add_adapter("other", SubnetConfig(density=0.5))
    loss = model(tokens(), labels=tokens()).loss
    model.set_adapter("other")
    loss.backward()


def disabled_between_forward_and_backward(tmp_path: Path) -> None:
    model = attach()
    loss = model(tokens(), labels=tokens()).loss
    with model.disable_adapter():
        loss.backward()


def stepped_between_forward_and_backward(tmp_path: Path) -> None:
    model = attach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    loss = model(tokens(), labels=tokens()).loss
    optimizer.step()
    loss.backward()


def schedule_free_optimizer(tmp_path: Path) -> None:
    class AdamWScheduleFree(torch.optim.AdamW):
        """Named as the real one, which changes values in train() and eval()."""

    model = attach()
    AdamWScheduleFree([p for p in model.parameters() if p.requires_grad]).step()


def shape_dependent_optimizer(tmp_path: Path) -> None:
    from transformers.optimization import Adafactor

    model = attach()
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad])
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()


def optimizer_built_before_the_callback(tmp_path: Path) -> None:
    model = tiny_llama()
    from transformers import Trainer

    Trainer(
        model,
        arguments(tmp_path),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        callbacks=[SubnetCallback(random_mask(model))],
    )


def callback_on_a_peft_model(tmp_path: Path) -> None:
    stock_trainer(attach(), arguments(tmp_path), [SubnetCallback(random_mask(tiny_llama()))])


def callback_into_an_existing_directory(tmp_path: Path) -> None:
    SubnetCallback(random_mask(tiny_llama()), save_merged=tmp_path)


def resumed_with_another_mask(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    stock_trainer(tiny_llama(), args, [SubnetCallback(random_mask(tiny_llama()))]).train()
    other = SubnetCallback(random_mask(tiny_llama(), seed=5))
    trainer = stock_trainer(tiny_llama(), arguments(tmp_path, max_steps=2), [other])
    trainer.train(resume_from_checkpoint=True)


def config_without_its_mask(tmp_path: Path) -> None:
    config = replace(SubnetConfig(mask=random_mask(tiny_llama())), clip="dense")
    peft.get_peft_model(tiny_llama(), config)(tokens())


def tied_head_in_modules_to_save(tmp_path: Path) -> None:
    attach(modules_to_save=["lm_head"])


def tokens_of_a_masked_embedding(tmp_path: Path) -> None:
    attach(trainable_token_indices=[5, 6])


def module_saved_whole_over_a_masked_one(tmp_path: Path) -> None:
    attach().add_adapter("other", SubnetConfig(density=0.1, modules_to_save=["up_proj"]))


def callback_with_modules_to_save(tmp_path: Path) -> None:
    SubnetCallback(SubnetConfig(density=0.1, modules_to_save=["lm_head"]))


def weight_replaced_by_a_plain_tensor(tmp_path: Path) -> None:
    norm = attach().get_base_model().model.norm
    del norm._parameters["weight"]  # as nn.DataParallel's replicas
    norm.weight = torch.zeros(64)


def float64_base(tmp_path: Path) -> None:
    attach(tiny_llama(torch.float64))


CASES: list[tuple[Callable[[Path], None], str]] = [
    (mask_of_another_model, "mask of another model"),
    (mask_of_another_shape, r"made for shape \(32,\), weight is \(64,\)"),
    (empty_mask, "empty"),
    (base_edited_in_one_covered_weight, "wrong base model"),
    (adapter_of_another_model, r"\(96, 64\), weight is \(97, 64\)"),
    (adapter_without_header, "subnet_ft_header"),
    (adapter_with_values_missing, "indices and values"),
    (unknown_selector, "selector: expected one of"),
    (density_zero, "density: expected"),
    (unknown_clip, "clip: expected one of"),
    (target_modules, "use include= and exclude="),
    (layers_to_transform, "found 0; a subnetwork is chosen by parameter name"),
    (pattern_without_match, "match"),
    (pattern_that_is_no_regex, "regular expression"),
    (float8_weight, "float8"),
    (quantized_weight, "quantized by bitsandbytes, found a Parameter of torch.uint8"),
    (cast_after_attaching, "cast the base model before"),
    (embeddings_resized_after_attaching, "resize embeddings before"),
    (embeddings_untied_after_attaching, "untie embeddings before"),
    (switched_between_forward_and_backward, "run backward before switching"),
    (disabled_between_forward_and_backward, "run backward before switching"),
    (stepped_between_forward_and_backward, "run backward before switching"),
    (shape_dependent_optimizer, "Adafactor, whose update depends on the shape"),
    (schedule_free_optimizer, "AdamWScheduleFree, whose train"),
    (optimizer_built_before_the_callback, "optimizers="),
    (callback_on_a_peft_model, "either the callback or"),
    (callback_into_an_existing_directory, "expected a new directory"),
    (resumed_with_another_mask, "another mask"),
    (config_without_its_mask, "has no entries"),
    (tied_head_in_modules_to_save, "one or the other"),
    (tokens_of_a_masked_embedding, "one or the other"),
    (module_saved_whole_over_a_masked_one, "one or the other"),
    (callback_with_modules_to_save, "cannot hold"),
    (weight_replaced_by_a_plain_tensor, "DataParallel"),
    (float64_base, "expected fp32, bf16 or fp16"),
]


@pytest.mark.parametrize(("act", "message"), CASES, ids=[act.__name__ for act, _ in CASES])
def test_bad_input_is_one_clear_line(
    act: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SubnetError, match=message) as raised:
        act(tmp_path)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, ValueError | TypeError)


def test_a_refused_mask_leaves_the_model_alone() -> None:
    """The last parameter is the wrong one: nothing before it may have been attached."""
    model = tiny_llama()
    before = snapshot(model)
    classes = [type(module) for module in model.modules()]
    good = random_mask(model)
    names = [*good, "model.unknown.weight"]
    bad = SubnetMask(
        {name: good[name] if name in good else torch.tensor([0]) for name in names},
        {**good.shapes, "model.unknown.weight": (1,)},
    )
    with pytest.raises(SubnetError):
        peft.get_peft_model(model, SubnetConfig(mask=bad))
    assert not list(sidecar_layers(model))
    assert [type(module) for module in model.modules()] == classes
    for name, parameter in model.named_parameters():
        assert torch.equal(as_integers(before[name]), as_integers(parameter))


def test_unregistered_header_version_is_refused(tmp_path: Path) -> None:
    attach().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("subnet_ft_header"))
    header = json.loads(bytes(tensors[key].numpy())) | {"version": "99"}
    tensors[key] = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    save_file(tensors, file)
    with pytest.raises(SubnetError, match="version"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
