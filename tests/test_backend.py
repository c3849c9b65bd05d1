"""Training with the Triton kernels forced, interpreted where there is no GPU."""

import itertools

import peft
import pytest
import torch

from subnet_ft import SubnetAdamW, SubnetConfig, SubnetError, SubnetMask, ops
from subnet_ft.adapter import subnet
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.adapter.layer import SubnetLayer
from tests.helpers import (
    assert_off_mask_untouched,
    assert_same_bits,
    random_mask,
    snapshot,
    tiny_llama,
    tokens,
)
from tests.kernel_helpers import DEVICE, jitted

STATES = list(itertools.product([32, 8], ["fp32", "residual"]))


def train(bits: int, master: str, weight_grad: str = "dense") -> tuple[peft.PeftModel, SubnetMask]:
    base = tiny_llama(torch.bfloat16).to(DEVICE)
    mask = random_mask(base, 0.1)
    dtype = "bfloat16" if master == "residual" else "float32"
    model = peft.get_peft_model(
        base, SubnetConfig(mask=mask, values_dtype=dtype, weight_grad=weight_grad)
    )
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = SubnetAdamW(values, lr=1e-3, state_bits=bits, master=master)
    for step in range(3):
        ids = tokens(seed=step).to(DEVICE)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, mask


def assert_moved_alike(ours: SubnetLayer, theirs: SubnetLayer) -> None:
    """Both went the same way, up to rounding."""
    moved, right = (
        subnet.values.float() - subnet.originals.float()
        for subnet in (ours.subnets()[0], theirs.subnets()[0])
    )
    assert (moved - right).norm() <= 0.05 * right.norm(), ours.name


@pytest.mark.parametrize(("bits", "master"), STATES)
def test_forced_kernels_train_as_torch_does(
    bits: int, master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, _ = train(bits, master)
    called = []
    for name in ("gather", "scatter_", "adamw_step_", "adamw_small_step_"):

        def counted(
            *args: object, name: str = name, of: object = getattr(jitted, name), **kw: object
        ):
            called.append(name)
            return of(*args, **kw)

        monkeypatch.setattr(jitted, name, counted)
    monkeypatch.setenv("SUBNET_FT_BACKEND", "triton")
    assert ops.backend() == "triton"
    model, mask = train(bits, master)
    step = "adamw_step_" if (bits, master) == (32, "fp32") else "adamw_small_step_"
    assert called.count(step) == 3, "one launch a step for all tensors"
    assert "gather" in called
    base = snapshot(tiny_llama(torch.bfloat16).to(DEVICE))
    after = snapshot(model.get_base_model())
    weights = {name: w for name, w in after.items() if "subnet_ft" not in name}
    assert_off_mask_untouched(base, weights, mask)
    for ours, theirs in zip(sidecar_layers(model), sidecar_layers(exact), strict=True):
        entries = ours.subnets()[0]
        held = ours.weight.flatten()[entries.indices]
        assert_same_bits(held, entries.values.to(torch.bfloat16), ours.name)
        assert_moved_alike(ours, theirs)


def test_forced_weight_grad_keeps_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = train(32, "fp32", "compact")
    monkeypatch.setenv("SUBNET_FT_BACKEND", "triton")
    encoded = []
    encode = subnet.encode_tiles
    monkeypatch.setattr(
        subnet,
        "encode_tiles",
        lambda *a: encoded.append(a) or encode(*a),  # type: ignore[func-returns-value]
    )
    model, _ = train(32, "fp32", "compact")
    assert encoded and len({indices.data_ptr() for indices, *_ in encoded}) == len(encoded)
    for ours, theirs in zip(sidecar_layers(model), sidecar_layers(exact), strict=True):
        # A K bias moves all scores of a query nearly alike, which softmax takes out again: of its
        # gradient (median 5e-6 where V's has 2e-2) the two products' rounding can be a large part,
        # and Adam makes a whole step of it.
        if not ours.name.endswith("k_proj.bias"):
            assert_moved_alike(ours, theirs)


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBNET_FT_BACKEND", "cuda")
    with pytest.raises(SubnetError, match="SUBNET_FT_BACKEND"):
        ops.backend()
