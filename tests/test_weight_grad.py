"""weight_grad: compact gradients of linear layers without the dense one."""

from typing import Any

import peft
import pytest
import torch

from benchmarks.common import transient_bytes
from subnet_ft import SubnetAdamW, SubnetConfig, SubnetError, ops
from subnet_ft.adapter.inject import sidecar_layers
from subnet_kernels import _ops, encoding, reference_weight_grad, twins
from tests.helpers import assert_off_mask_untouched, random_mask, snapshot, tiny_llama, tokens
from tests.kernel_helpers import DEVICE, assert_no_worse, jitted, poisoned

SHAPES = [(7, 5, 3), (64, 96, 33), (1, 130, 257), (300, 20, 1)]  # tokens, rows, cols


def kept(keep: str, numel: int) -> torch.Tensor:
    return {
        "one": torch.tensor([numel // 2]),
        "last": torch.tensor([numel - 1]),
        "all": torch.arange(numel),
        "third": torch.arange(0, numel, 3),
        "lower half": torch.arange(numel // 2, numel),
    }[keep]


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    t, rows, cols = shape
    torch.manual_seed(0)
    return torch.randn(t, rows).to(dtype), torch.randn(t, cols).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", ["one", "last", "all", "third", "lower half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_dense_gradient(
    shape: tuple[int, int, int], keep: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the dense gradient's own error, but for a rounding and a sum in another order.

    Of n products an fp32 sum's error grows as sqrt(n) roundings, if they are summed one by one, as
    some processors' matrix libraries do for narrow matrices, others' not.
    """
    monkeypatch.setattr(reference_weight_grad, "CHUNK", 3 * shape[2])  # many chunks
    dy, x = operands(shape, dtype)
    numel = shape[1] * shape[2]
    indices = kept(keep, numel)
    truth = (dy.double().t() @ x.double()).flatten()[indices]
    dense = (dy.t() @ x).flatten()[indices].double()
    found = twins.weight_grad(dy, x, indices, torch.full((indices.numel(),), torch.nan))
    sum_error = torch.finfo(torch.float32).eps * shape[0] ** 0.5
    tolerance = (torch.finfo(dtype).eps + sum_error) * truth.abs().max()
    assert (found.double() - truth).abs().max() <= (dense - truth).abs().max() + tolerance
    twice = twins.weight_grad(dy, x, indices, found.clone(), accumulate=True)
    torch.testing.assert_close(twice, 2 * found)
    assert torch.equal(_ops.weight_grad(dy, x, indices.int()), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", ["one", "last", "all", "third", "lower half"])
@pytest.mark.parametrize("shape", [(7, 5, 3), (33, 20, 70), (1, 18, 130)], ids=str)
def test_kernel(shape: tuple[int, int, int], keep: str, dtype: torch.dtype) -> None:
    """At most the twin's error, but for fp32 rounding of a sum."""
    dy, x = (t.to(DEVICE) for t in operands(shape, dtype))
    indices = kept(keep, shape[1] * shape[2]).to(DEVICE)
    truth = (dy.double().t() @ x.double()).flatten()[indices]
    twin = twins.weight_grad(dy, x, indices)
    tiles = encoding.encode_tiles(indices, *shape[1:])
    found = jitted.weight_grad(dy, x, indices, poisoned(indices.numel()), tiles=tiles)
    assert_no_worse([truth], [twin], [found], 1e-6)
    twice = jitted.weight_grad(dy, x, indices.int(), found.clone(), accumulate=True)
    torch.testing.assert_close(twice, 2 * found)


def test_kernel_keeps_a_nan_to_its_row_and_column() -> None:
    dy, x = (t.to(DEVICE) for t in operands((20, 20, 70), torch.float32))
    dy[:, 3], x[:, 5] = torch.nan, torch.nan
    indices = kept("all", 20 * 70).to(DEVICE)
    found = jitted.weight_grad(dy, x, indices).view(20, 70)
    expected = torch.zeros(20, 70, dtype=torch.bool, device=DEVICE)
    expected[3], expected[:, 5] = True, True
    assert torch.equal(found.isnan(), expected)


def test_kernel_refuses_what_it_would_read_wrongly() -> None:
    dy, x = (t.to(DEVICE) for t in operands((8, 6, 4), torch.float32))
    index = torch.tensor([0, 5], device=DEVICE)
    for bad in (
        (dy.t().contiguous().t(), x, index),
        (dy, x.half(), index),
        (dy, x[:4], index),
        (dy, x, index.float()),
        (dy, x, index, torch.zeros(3, device=DEVICE)),
    ):
        with pytest.raises(ValueError, match="expected"):
            jitted.weight_grad(*bad)
    assert jitted.weight_grad(dy, x, index[:0]).numel() == 0


def test_operator() -> None:
    dy, x = operands((7, 5, 3), torch.float32)
    torch.library.opcheck(_ops.weight_grad, (dy, x, torch.tensor([0, 4, 14])))


def gradients(dtype: torch.dtype, **config: Any) -> tuple[Any, list[torch.Tensor]]:
    model: Any = tiny_llama(dtype)
    model = peft.get_peft_model(model, SubnetConfig(mask=random_mask(model, 0.2), **config))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return model, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_the_adapter(dtype: torch.dtype, checkpointing: bool) -> None:
    model, compact = gradients(dtype, weight_grad="compact")
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable()
        model.train().zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        compact = [p.grad for p in model.parameters() if p.requires_grad]
    _, dense = gradients(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for a, b in zip(compact, dense, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_it_trains_and_leaves_the_rest_alone() -> None:
    model: Any = tiny_llama(torch.bfloat16)
    mask, before = random_mask(model), snapshot(model)
    model = peft.get_peft_model(model, SubnetConfig(mask=mask, weight_grad="compact"))
    optimizer = SubnetAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_off_mask_untouched(before, snapshot(model.unload()), mask)


def test_a_layer_may_be_followed_by_work_in_place() -> None:
    grads = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model: Any = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(inplace))
        config = SubnetConfig(density=0.5, include="all", weight_grad="compact")
        model = peft.get_peft_model(model, config)
        model(torch.randn(4, 8)).sum().backward()
        grads.append(torch.cat([p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_values_stepped_within_backward_do_not_reach_the_inputs_gradient() -> None:
    losses = []
    for released in (False, True):
        model, _ = gradients(torch.float32, weight_grad="compact")
        model.zero_grad()
        values = [p for p in model.parameters() if p.requires_grad]
        optimizer = SubnetAdamW(values, lr=0.1, release_gradients=released)
        for _ in range(3):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_the_kernel_can_be_forced() -> None:
    dy, x = (t.to(DEVICE) for t in operands((7, 5, 3), torch.float32))
    index = torch.tensor([0, 4, 14], device=DEVICE)
    torch.testing.assert_close(
        ops.weight_grad(dy, x, index, impl="triton"), ops.weight_grad(dy, x, index)
    )


def test_a_step_between_forward_and_backward_is_refused() -> None:
    model, _ = gradients(torch.float32, weight_grad="compact")
    loss = model(input_ids=tokens(), labels=tokens()).loss
    SubnetAdamW([p for p in model.parameters() if p.requires_grad]).step()
    with pytest.raises(SubnetError, match="run backward before"):
        loss.backward()


def test_full_graph() -> None:
    torch._dynamo.reset()
    eager, expected = gradients(torch.float32, weight_grad="compact")
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    expected = [g.clone() for g in expected]
    eager.zero_grad()
    compiled(input_ids=tokens(), labels=tokens()).loss.backward()
    found = [p.grad for p in eager.parameters() if p.requires_grad]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_dense_clipping_needs_the_dense_gradient() -> None:
    with pytest.raises(SubnetError, match="clip="):
        SubnetConfig(weight_grad="compact", clip="dense")


def test_auto_takes_the_compact_way_where_it_pays() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2048, 1024), torch.nn.Linear(1024, 1024))
    model = peft.get_peft_model(
        model, SubnetConfig(density=0.01, weight_grad="auto", include="all")
    )
    weights = [layer for layer in sidecar_layers(model) if len(layer.shape) == 2]
    assert [layer.computes_weight_grad for layer in weights] == [True, False]


def peak_of_backward(weight_grad: str) -> int:
    """Largest number of bytes allocated during a backward pass, beyond those before it."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(3)))
    config = SubnetConfig(density=0.01, include="all", weight_grad=weight_grad)
    model = peft.get_peft_model(model, config)
    loss = model(torch.randn(4, 2048)).square().mean()
    return transient_bytes(loss.backward)


def test_the_transient_is_below_the_largest_dense_gradient() -> None:
    largest = 2048 * 2048 * 4
    assert peak_of_backward("dense") >= largest
    assert peak_of_backward("compact") < largest / 2
