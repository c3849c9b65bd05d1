"""Proof that nothing moved outside the mask, without a second copy of the model.

The bits of every weight are summed as integers, less those of the masked entries. Any single entry
that moves changes its tensor's sum; only moves that cancel to the bit can hide.
"""

import torch
from torch import nn

from subnet_ft import ops
from subnet_ft.adapter.inject import base_parameters, sidecar_layers

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def off_mask_sums(root: nn.Module) -> dict[str, int]:
    """Sum the bits of every base parameter outside its masked entries.

    Args:
        root: A base model with sidecars attached.

    Returns:
        Base parameter name -> integer; parameters that train whole are left out.
    """
    layers = {layer.name: layer for layer in sidecar_layers(root)}
    sums = {}
    for name, ((module, leaf), *_) in base_parameters(root).items():
        weight = module._parameters[leaf]
        if weight is None or weight.requires_grad:
            continue
        bits = weight.data.contiguous().view(_INTEGER[weight.element_size()])
        total = int(bits.sum(dtype=torch.int64))
        if name in layers:
            adapters = tuple(layers[name].subnet_ft_values)
            indices = torch.cat([s.indices for s in layers[name].subnets((adapters, 0))])
            if len(adapters) > 1:
                indices = indices.unique()
            total -= int(_sum_at(bits, indices))
        sums[name] = total
    return sums


def _sum_at(bits: torch.Tensor, indices: torch.Tensor) -> int:
    inside = torch.empty(indices.numel(), dtype=bits.dtype, device=bits.device)
    return int(ops.gather(bits, indices, inside).sum(dtype=torch.int64))


def drifted(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Name the parameters whose weights outside the mask are not what they were."""
    return [name for name, total in before.items() if after.get(name) != total]
