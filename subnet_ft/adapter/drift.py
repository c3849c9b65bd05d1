"""Proof that nothing moved outside the mask, without a second copy of the model.

The bits of every weight are summed as integers, less those of the masked entries. Any single entry
that moves changes its tensor's sum; only moves that cancel to the bit can hide.
"""

import torch
from torch import nn

from subnet_ft.adapter.inject import base_parameters, sidecar_layers

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


def off_mask_sums(root: nn.Module) -> dict[str, int]:
    """Sum the bits of every base parameter outside its masked entries.

    Args:
        root: A base model with sidecars attached.

    Returns:
        Base parameter name -> integer; parameters that train whole are left out.
    """
    layers = {layer.name: layer for layer in sidecar_layers(root) if layer.in_place}
    sums = {}
    for name, ((module, leaf), *_) in base_parameters(root).items():
        weight = module._parameters[leaf]
        if weight is None or weight.requires_grad:
            continue
        bits = weight.data.contiguous().view(_INTEGER[weight.element_size()])
        total = _sum(bits.view(-1))
        if name in layers:
            adapters = tuple(layers[name].subnet_ft_values)
            indices = torch.cat([s.indices for s in layers[name].subnets(adapters)])
            if len(adapters) > 1:
                indices = indices.unique()
            total -= sum(_sum(bits.view(-1)[part]) for part in indices.split(_CHUNK))
        sums[name] = total
    return sums


def _sum(bits: torch.Tensor) -> int:
    # In chunks: torch widens its input to the sum's dtype first.
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(_CHUNK))


def drifted(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Name the parameters whose weights outside the mask are not what they were."""
    return [name for name, total in before.items() if after.get(name) != total]
