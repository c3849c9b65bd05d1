"""torch.compile keeps one graph for the whole model, the reference pass included."""

from typing import Any

import peft
import pytest
import torch

from subnet_ft import SubnetAdamW, SubnetConfig
from tests.helpers import assert_same_bits, random_mask, snapshot, tiny_llama, tokens


def run(compiled: bool, dtype: torch.dtype, steps: int = 4) -> tuple[Any, list[float]]:
    """As DPO does: a reference pass with the adapter off between forward and backward."""
    model: Any = tiny_llama(dtype)
    model = peft.get_peft_model(model, SubnetConfig(mask=random_mask(model)))
    optimizer = SubnetAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    forward, losses = model, []
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(steps):
        ids = tokens(seed=step)
        # Compiled in the first step: once with gradients, once without; then never again.
        with torch.compiler.set_stance("fail_on_recompile" if step and compiled else "default"):
            loss = forward(input_ids=ids, labels=ids).loss
            with torch.no_grad(), model.disable_adapter():
                reference = forward(input_ids=ids, labels=ids).loss
            (loss - 0.5 * reference).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item(), reference.item()]
    return model, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_full_graph_trains_as_eager_does(dtype: torch.dtype) -> None:
    eager, eager_losses = run(False, dtype)
    compiled, compiled_losses = run(True, dtype)
    assert compiled_losses == eager_losses
    assert eager_losses[::2] != eager_losses[1::2]  # the adapter does something
    for (name, expected), found in zip(
        snapshot(eager).items(), snapshot(compiled).values(), strict=True
    ):
        assert_same_bits(expected, found, name)
