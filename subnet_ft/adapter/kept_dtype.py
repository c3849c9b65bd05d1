"""Values that stay fp32 where a trainer casts every trainable parameter of a quantized model.

TRL does so, to bf16 and in place (``param.data = param.data.to(torch.bfloat16)``), as QLoRA does
with its two factors. Values are weights themselves: in bf16 small updates are lost, and what an
adapter file had learned before is rounded.
"""

import logging
from typing import Any

import torch
from torch import nn

from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.adapter.quantized import has_quantized

logger = logging.getLogger(__name__)


_DATA: Any = torch.Tensor.data


class KeptDtype(nn.Parameter):
    """A parameter whose ``data`` may move and change, but not to another dtype."""

    @property
    def data(self) -> torch.Tensor:
        """The storage, without autograd; what is set is taken in the dtype there is."""
        found: torch.Tensor = _DATA.__get__(self)
        return found

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        old = self.data
        if new.dtype != old.dtype:
            logger.info("values stay %s: a cast to %s was not taken", old.dtype, new.dtype)
            cast = old.to(new)
            new = (old if torch.equal(cast, new) else new).to(new.device, old.dtype)
        _DATA.__set__(self, new)


def keep_values(root: nn.Module) -> None:
    """Have the values of a quantized model keep their dtype, also those of its other weights.

    Args:
        root: A base model; left alone if nothing of it is quantized.
    """
    if not has_quantized(root):
        return
    for layer in sidecar_layers(root):
        for subnet in layer.subnets(tuple(layer.subnet_ft_values)):
            subnet.values.__class__ = KeptDtype
