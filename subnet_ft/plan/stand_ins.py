"""What a GPU's kernels allocate, for a trace that is of CPU tensors.

PyTorch built without CUDA has no autograd for CUDA tensors, fake ones included. Two things a GPU
does in one kernel are therefore made here of nothing but its allocations: flash attention, and the
tiles of TRL's fused output head. Everything else is the code itself.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from subnet_ft.errors import ConfigError
from subnet_kernels import reference_adamw


class FlashAllocations(torch.autograd.Function):
    """Allocates what PyTorch's flash attention does (aten's flash_api.cpp), and computes nothing.

    Scores never exist. Forward keeps the logsumexp; backward needs an fp32 sum of the gradient of
    the queries, and one of keys and values for each query head before summing over a group.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Take (batch, heads, tokens, head_dim) each; keys and values may have fewer heads."""
        out = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return gradients of the three."""
        query, key, value, _, _ = ctx.saved_tensors
        result = tuple(torch.empty_like(t) for t in (query, key, value))
        scratch = [
            query.new_empty(query.shape[:3], dtype=torch.float32),
            torch.empty_like(query, dtype=torch.float32),
        ]
        if key.shape[1] != query.shape[1]:
            each_head = (*query.shape[:2], *key.shape[2:])
            scratch += [key.new_empty(each_head), value.new_empty(each_head)]
        del scratch
        return result


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    out: Tensor = FlashAllocations.apply(query, key, value)
    return out.transpose(1, 2).contiguous(), None


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    causal, grouped = query.shape[2] > 1, key.shape[1] != query.shape[1]
    attend = nn.functional.scaled_dot_product_attention
    out = attend(query, key, value, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


# Under a name that is not its own, transformers makes no mask, which nothing here would read. (One
# with "flash" in it is taken for a package.)
ATTENTION = {"gpu": "subnet_plan_gpu", "cpu": "subnet_plan_cpu"}
AttentionInterface.register(ATTENTION["gpu"], _flash)
AttentionInterface.register(ATTENTION["cpu"], _sdpa)


def fused_head(model: nn.Module, outputs: tuple[str, ...]) -> None:
    """Give a model TRL's fused output head, as its trainers do.

    Raises:
        ConfigError: TRL is not installed.
    """
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError as error:
        raise ConfigError(
            f"expected TRL, whose training step is traced, found {error}; install it with pip "
            "install 'subnet-ft[trl]'"
        ) from error
    add_fused_lm_head(model, outputs=outputs)


@contextmanager
def stand_ins(device: str) -> Iterator[None]:
    """Trace what a device allocates, and only once what would be traced again and again.

    On a GPU the fused output head folds its tiles in place, as its Triton kernels do. Small state
    is stepped in stretches that all need the same: each weight's first stands for the rest.
    `nn.Module.to` replaces the data of a fake parameter, as of a real one, where torch would swap
    objects and refuses those that something refers to weakly.

    Args:
        device: ``"gpu"`` or ``"cpu"``.
    """
    from trl.kernels import chunked_logprob

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    update = reference_adamw.small_update_

    def first_stretch(state: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        if state["values"].storage_offset() == 0:
            update(state, *args, **kwargs)

    def replace_data(parameter: Tensor, converted: Tensor) -> None:
        parameter.data = converted.data

    tiles = ("_forward_tile", "_backward_tile", "_addmm_fp32") if device == "gpu" else ()
    with ExitStack() as stack:
        for name in tiles:
            stack.enter_context(mock.patch.object(chunked_logprob, name, nothing))
        stack.enter_context(mock.patch.object(reference_adamw, "small_update_", first_stretch))
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", replace_data))
        yield
