"""PEFT's verbs on a subnetwork: each leaves exactly the right bits in the weights."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from subnet_ft import SubnetConfig, SubnetError, ops
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.checkpoints.adapter_mask import open_mask_or_adapter
from subnet_ft.mask import SubnetMask
from tests.helpers import (
    as_integers,
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    snapshot,
    tiny_llama,
    tokens,
)

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def attached(
    dtype: torch.dtype = torch.float32, density: float = 0.1, **config: Any
) -> tuple[Any, SubnetMask, dict[str, torch.Tensor]]:
    """A masked tiny Llama, its mask and its weights before."""
    model = tiny_llama(dtype)
    mask, base = random_mask(model, density), snapshot(model)
    return peft.get_peft_model(model, SubnetConfig(mask=mask, **config)), mask, base


def train(model: Any, steps: int = 3, lr: float = 0.05) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    """The base's parameters by their own names, as they are now."""
    ours = {id(p) for layer in sidecar_layers(model) for p in layer.parameters()}
    named = model.get_base_model().named_parameters()
    return {name: p.detach().clone() for name, p in named if id(p) not in ours}


def assert_weights(model: Any, expected: dict[str, torch.Tensor]) -> None:
    found = base_weights(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert_same_bits(weight, found[name], name)


@DTYPES
def test_only_masked_entries_move(dtype: torch.dtype) -> None:
    model, mask, base = attached(dtype)
    train(model)
    after = base_weights(model)
    assert_off_mask_untouched(base, after, mask)
    for name in mask:
        moved = (
            as_integers(after[name]).flatten()[mask[name].long()]
            != as_integers(base[name]).flatten()[mask[name].long()]
        )
        assert moved.any(), f"{name} never trained"


@DTYPES
def test_disable_switch_and_unload_restore_the_base(dtype: torch.dtype) -> None:
    model, _, base = attached(dtype)
    train(model)
    trained = base_weights(model)
    with model.disable_adapter():
        assert_weights(model, base)
    assert_weights(model, trained)
    model.add_adapter("other", SubnetConfig(mask=random_mask(tiny_llama(dtype), 0.2, seed=1)))
    assert_weights(model, trained)
    model.set_adapter("other")
    assert_weights(model, base)
    train(model)
    assert not torch.equal(base_weights(model)["model.norm.weight"], base["model.norm.weight"])
    model.set_adapter("default")
    assert_weights(model, trained)
    model.delete_adapter("other")
    assert_weights(model, trained)
    unloaded = model.unload()
    for name, parameter in unloaded.named_parameters():
        assert_same_bits(base[name], parameter.detach(), name)


@DTYPES
def test_merge_unmerge_and_merge_and_unload(dtype: torch.dtype) -> None:
    model, _, base = attached(dtype)
    train(model)
    trained = base_weights(model)
    ids = tokens()
    model.eval()
    attached_output = model(ids).logits
    model.merge_adapter(safe_merge=True)
    assert_weights(model, trained)
    model.unmerge_adapter()
    assert_weights(model, trained)
    with model.disable_adapter():
        assert_weights(model, base)
    merged = model.merge_and_unload(safe_merge=True)
    assert (
        type(merged.lm_head) is nn.Linear
        and merged.lm_head.weight is merged.get_input_embeddings().weight
    )
    assert list(merged.state_dict()) == list(tiny_llama(dtype).state_dict())
    for name, parameter in merged.named_parameters():
        assert_same_bits(trained[name], parameter.detach(), name)
    assert_same_bits(attached_output, merged(ids).logits, "logits")


def test_merge_keeps_an_adapter_that_is_not_active() -> None:
    model, _, base = attached()
    train(model)
    trained = base_weights(model)
    model.add_adapter("other", SubnetConfig(mask=random_mask(tiny_llama(), 0.2, seed=1)))
    model.set_adapter("other")
    model.merge_adapter(["default"])
    assert_weights(model, trained)
    model.unmerge_adapter()
    assert_weights(model, base)


def test_safe_merge_refuses_nan() -> None:
    model, _, base = attached()
    next(sidecar_layers(model)).subnets()[0].values.data[0] = float("nan")
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert_weights(model, base)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@DTYPES
def test_save_and_load(dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, mask, base = attached(dtype)
    train(model)
    trained = base_weights(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        tiny_llama(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert_weights(loaded, trained)
    assert not any(p.requires_grad for p in loaded.parameters())
    with loaded.disable_adapter():
        assert_weights(loaded, base)
    loaded.load_adapter(tmp_path, "again", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("again")
    assert_weights(loaded, trained)
    train(loaded, steps=1)
    assert_off_mask_untouched(base, base_weights(loaded), mask)
    loaded.save_pretrained(tmp_path / "both")
    second = peft.PeftModel.from_pretrained(tiny_llama(dtype), tmp_path / "both" / "again")
    assert_weights(second, base_weights(loaded))


def test_the_file_is_the_truth(tmp_path: Path) -> None:
    """Loading over other entries replaces them: values, indices and parameters."""
    model, mask, base = attached()
    train(model)
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(tiny_llama(), SubnetConfig(selector="random", density=0.3))
    train(other)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert_weights(other, base_weights(model))
    assert {layer.name for layer in sidecar_layers(other)} == set(mask)
    with other.disable_adapter():
        assert_weights(other, base)


def test_the_file_keeps_what_the_density_is_a_share_of(tmp_path: Path) -> None:
    whole = random_mask(tiny_llama())
    name = "model.layers.0.mlp.up_proj.weight"
    mask = SubnetMask({name: whole[name]}, whole.shapes)
    model = peft.get_peft_model(tiny_llama(), SubnetConfig(mask=mask))
    model.save_pretrained(tmp_path / "first")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    for directory in ("first", "second"):
        stored = open_mask_or_adapter(tmp_path / directory)
        assert stored == mask and stored.density == mask.density < 0.01


def test_adapter_file_is_small(tmp_path: Path) -> None:
    for density in (0.01, 0.1):
        model = tiny_llama(vocab=2048)
        mask = random_mask(model, density)
        peft.get_peft_model(model, SubnetConfig(mask=mask)).save_pretrained(tmp_path)
        size = (tmp_path / "adapter_model.safetensors").stat().st_size
        d = mask.density
        assert size <= mask.numel * (min(4 * d, 0.125) + 4 * d) + 512 * len(mask)


def test_several_active_adapters_add_their_deltas() -> None:
    model, mask, base = attached()
    train(model)
    model.add_adapter("other", SubnetConfig(mask=random_mask(tiny_llama(), 0.1, seed=1)))
    model.set_adapter("other")
    train(model)
    model.base_model.set_adapter(["default", "other"])
    for layer in sidecar_layers(model):
        expected = base[layer.name].double().flatten()
        for subnet in layer.subnet_ft_values.values():
            expected[subnet.indices] += (subnet.values - subnet.originals).double()
        torch.testing.assert_close(
            layer.weight.detach().double().flatten(), expected, rtol=0, atol=1e-6
        )
    assert_off_mask_untouched(base, base_weights(model), mask | random_mask(tiny_llama(), 0.1, 1))
    with model.disable_adapter():
        assert_weights(model, base)


def test_values_written_by_hand_need_a_flush() -> None:
    model, _, _ = attached(torch.bfloat16)
    layer = next(sidecar_layers(model))
    subnet = layer.subnets()[0]
    subnet.values.data.add_(1.0)
    model.flush()
    written = layer.weight.detach().flatten()[subnet.indices]
    assert_same_bits(written, subnet.values.detach().to(torch.bfloat16))


def test_tied_embedding_gets_both_gradients() -> None:
    model, mask, _ = attached()
    dense = tiny_llama()
    ids = tokens()
    dense(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    assert (
        model.get_base_model().lm_head.weight.data_ptr()
        == dict(model.get_base_model().named_parameters())["model.embed_tokens.weight"].data_ptr()
    )
    for layer in sidecar_layers(model):
        gradient = dict(dense.named_parameters())[layer.name].grad.flatten()[
            mask[layer.name].long()
        ]
        assert_same_bits(layer.subnets()[0].values.grad, gradient, layer.name)


@pytest.mark.parametrize("kind", ["experts", "conv1d"])
def test_any_parameter_of_any_module(kind: str, tmp_path: Path) -> None:
    """Fused 3-D experts, routers, LayerNorms with bias, Conv1D, position embeddings."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        if kind == "experts":
            return Qwen3MoeForCausalLM(
                Qwen3MoeConfig(
                    vocab_size=96,
                    hidden_size=32,
                    intermediate_size=48,
                    moe_intermediate_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=8,
                    num_experts=4,
                    num_experts_per_tok=2,
                    decoder_sparse_step=1,
                )
            )
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=96,
                n_positions=32,
                n_embd=32,
                n_layer=2,
                n_head=4,
                attn_pdrop=0,
                embd_pdrop=0,
                resid_pdrop=0,
            )
        )

    model, dense = build(), build()
    mask, base = random_mask(model, 0.2), snapshot(model)
    model = peft.get_peft_model(model, SubnetConfig(mask=mask))
    ids = tokens()
    dense(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    for layer in sidecar_layers(model):
        gradient = dict(dense.named_parameters())[layer.name].grad.flatten()[
            mask[layer.name].long()
        ]
        assert_same_bits(layer.subnets()[0].values.grad, gradient, layer.name)
    model.zero_grad()
    train(model)
    assert_off_mask_untouched(base, base_weights(model), mask)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert_weights(loaded, base_weights(model))


def test_modules_to_save(tmp_path: Path) -> None:
    def build() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        config = tiny_llama().config
        config.num_labels = 3
        return LlamaForSequenceClassification(config)

    config = SubnetConfig(density=0.1, modules_to_save=["score"], task_type="SEQ_CLS")
    model = peft.get_peft_model(build(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(tokens(), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    assert_same_bits(model.eval()(tokens()).logits, loaded(tokens()).logits, "logits")
    assert not torch.equal(loaded(tokens()).logits, build().eval()(tokens()).logits)


def test_include_and_exclude() -> None:
    def names(**config: Any) -> set[str]:
        model = peft.get_peft_model(tiny_llama(), SubnetConfig(**config))
        return {layer.name for layer in sidecar_layers(model)}

    every = {name for name, _ in tiny_llama().named_parameters()}
    linear = {n for n in every if n.endswith("_proj.weight")}
    assert names() == linear
    assert names(include="all") == every
    assert names(include=r".*layernorm\.weight") == {n for n in every if "layernorm" in n}
    mask = random_mask(tiny_llama())
    assert names(mask=mask) == every
    assert names(mask=mask, include="all-linear") == linear
    assert names(mask=mask, exclude=[r".*bias", r".*norm.*"]) == {
        n for n in every if "norm" not in n and not n.endswith("bias")
    }


def test_random_recipe_is_two_percent_reproducible_and_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    models = [peft.get_peft_model(tiny_llama(), SubnetConfig()) for _ in range(2)]
    layers = [list(sidecar_layers(model)) for model in models]
    for a, b in zip(*layers, strict=True):
        assert torch.equal(a.subnets()[0].indices, b.subnets()[0].indices)
        assert a.subnets()[0].indices.numel() == round(0.02 * a.weight.numel())
    trainable, _ = models[0].get_nb_trainable_parameters()
    assert trainable == sum(layer.subnets()[0].indices.numel() for layer in layers[0])
    said = f"no mask given: training a random 2% of each of 14 parameters (all-linear), {trainable}"
    assert caplog.text.count(said) == 2
    models[0].add_adapter("ref", models[0].peft_config["default"])  # as TRL copies one
    models[0].save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    peft.get_peft_model(tiny_llama(), SubnetConfig(mask=random_mask(tiny_llama())))
    assert caplog.text.count("no mask given") == 2


def test_config_holds_no_mask_and_no_path(tmp_path: Path) -> None:
    random_mask(tiny_llama()).save(tmp_path / "mask.safetensors")
    config = SubnetConfig(mask=tmp_path / "mask.safetensors")
    assert "mask" not in config.to_dict() and str(tmp_path) not in str(config.to_dict())
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).peft_type == "SUBNET_FT"


@pytest.mark.parametrize(
    "code",
    [
        "import subnet_ft, sys; assert not {'peft', 'transformers', 'triton'} & set(sys.modules); "
        "import peft; peft.PeftType('SUBNET_FT')",
        "import peft, subnet_ft; peft.PeftType('SUBNET_FT')",
        "import subnet_ft, importlib.util; importlib.util.find_spec('peft'); import peft; "
        "assert 'SUBNET_FT' in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING",
    ],
    ids=["before", "after", "looked-for"],
)
def test_peft_knows_the_type(code: str) -> None:
    root = Path(__file__).parents[1]
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'kernels/torch-ext')!r}]; "
    subprocess.run([sys.executable, "-c", path + code], check=True)


def test_a_second_mask_replaces_the_first() -> None:
    model = tiny_llama()
    base = snapshot(model)
    whole = random_mask(model)
    first = peft.get_peft_model(model, SubnetConfig(mask=whole.filter(r".*layers\.0.*")))
    train(first)
    second_mask = whole.filter(r".*layers\.1.*")
    second = peft.get_peft_model(first.get_base_model(), SubnetConfig(mask=second_mask))
    trained = {layer.name for layer in sidecar_layers(second) if layer.subnets()}
    assert trained == set(second_mask)
    train(second)
    assert_off_mask_untouched(base, base_weights(second), second_mask)


@pytest.mark.parametrize("live", ["default", "other", "none"])
def test_load_state_dict_leaves_only_what_is_live(live: str) -> None:
    model, _, base = attached()
    model.add_adapter("other", SubnetConfig(mask=random_mask(tiny_llama(), 0.2, seed=1)))
    train(model)
    trained, state = base_weights(model), copy.deepcopy(model.state_dict())
    if live == "none":
        with model.disable_adapter():
            model.load_state_dict(state)
            assert_weights(model, base)
    else:
        model.set_adapter(live)
        model.load_state_dict(state)
        assert_weights(model, trained if live == "default" else base)
    model.set_adapter("default")
    assert_weights(model, trained)


def test_loading_while_disabled_stays_disabled(tmp_path: Path) -> None:
    model, _, base = attached()
    train(model)
    trained = base_weights(model)
    model.save_pretrained(tmp_path)
    fresh = peft.get_peft_model(tiny_llama(), SubnetConfig(density=0.05))
    with fresh.disable_adapter():
        fresh.load_adapter(tmp_path, "again")
        assert_weights(fresh, base)
    fresh.set_adapter("again")
    assert_weights(fresh, trained)


def test_a_cast_to_the_weight_s_own_dtype_keeps_the_values() -> None:
    model, _, _ = attached(torch.bfloat16)
    train(model, lr=1e-4)
    values = {layer.name: layer.subnets()[0].values.clone() for layer in sidecar_layers(model)}
    model.to(torch.bfloat16)
    for layer in sidecar_layers(model):
        assert_same_bits(values[layer.name], layer.subnets()[0].values, layer.name)


def test_a_refused_cast_casts_nothing() -> None:
    model = tiny_llama()
    mask = random_mask(model).filter(r".*down_proj.*")
    model = peft.get_peft_model(model, SubnetConfig(mask=mask))
    for cast in (model.half, model.get_base_model().half):
        with pytest.raises(SubnetError, match="cast the base model before"):
            cast()
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_merging_while_disabled_merges() -> None:
    model, _, _ = attached()
    train(model)
    trained = base_weights(model)
    with model.disable_adapter():
        merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert_same_bits(trained[name], parameter.detach(), name)


def test_naming_an_adapter_twice_counts_it_once() -> None:
    model, _, _ = attached()
    train(model)
    trained = base_weights(model)
    model.base_model.set_adapter(["default", "default"])
    assert_weights(model, trained)


def test_get_parameter_gives_the_parameter() -> None:
    model = peft.get_peft_model(tiny_llama(), SubnetConfig(mask=random_mask(tiny_llama(), 0.1)))
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter


@pytest.mark.parametrize("clip", ["compact", "dense"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_gives_the_dense_gradient_s_entries(autocast: torch.dtype, clip: str) -> None:
    """The dense gradient is gathered from before it is cast, unless its norm is wanted."""
    model, mask, _ = attached(clip=clip)
    dense, ids, seen = tiny_llama(), tokens(), []
    for one in (model, dense):
        with torch.autocast("cpu", autocast):
            one(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.flatten() for name, p in dense.named_parameters()}
    for layer in sidecar_layers(model):
        (subnet,) = layer.subnets()
        if layer.name != "model.embed_tokens.weight":  # tied: two uses, summed after gathering
            seen.append(layer.name)
            assert_same_bits(
                expected[layer.name][mask[layer.name].long()], subnet.values.grad, layer.name
            )
    assert len(seen) == len(mask) - 1


def test_autocast_hands_over_no_dense_gradient_in_the_weight_s_dtype(monkeypatch: Any) -> None:
    model, _, _ = attached()
    dtypes, gather = set(), ops.gather

    def noting(dense: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if dense.ndim == 2:
            dtypes.add((tuple(dense.shape), dense.dtype))
        return gather(dense, *args, **options)

    monkeypatch.setattr(ops, "gather", noting)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert ((96, 64), torch.bfloat16) in dtypes and ((96, 64), torch.float32) in dtypes  # embedding
    assert {dtype for shape, dtype in dtypes if shape != (96, 64)} == {torch.bfloat16}


@pytest.mark.parametrize("weight_grad", ["dense", "compact"])
def test_autocast_keeps_no_copy_of_a_linear_weight_for_backward(weight_grad: str) -> None:
    """A copy of every weight in bf16 would be half of an fp32 model again, until backward."""
    model, _, _ = attached(weight_grad=weight_grad)
    weights = [la.weight for la in sidecar_layers(model) if la.weight.ndim == 2]
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    ids = tokens()
    assert all(ids.numel() not in weight.shape for weight in weights)  # nor has anything else
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
    shapes = {shape for weight in weights for shape in (weight.shape, weight.shape[::-1])}
    found = {tensor.data_ptr() for tensor in kept if tensor.shape in shapes}
    assert found == {weight.data_ptr() for weight in weights}
    loss.backward()
