"""Subnet: the entries one adapter trains of one parameter."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from subnet_ft.adapter.clip import OffMaskNorm
from subnet_ft.errors import MaskMismatchError
from subnet_ft.storage.codec import checksum
from subnet_kernels.encoding import Tiles, encode_tiles

MASK_ID = "mask_id"
Observer = Callable[[torch.Tensor, torch.Tensor], None]


class Subnet(nn.Module):
    """One adapter's entries of one parameter.

    Args:
        leaf: Name of the values parameter: ``"bias"`` for biases, so that rules which exempt biases
            from weight decay by name apply; else ``"weight"``.
        indices: (nnz,) int64, strictly increasing flat positions.
        originals: (nnz,) the base's entries, in the weight's dtype.
        dtype: Of the values; bfloat16 only where the weight is.
        offmask_uses: Give gradient clipping the norm of the dense gradient of a parameter used in
            this many places; 0: do not.
        computes_weight_grad: Have linear layers compute the gradient at these entries alone.
    """

    indices: torch.Tensor
    originals: torch.Tensor

    def __init__(
        self,
        leaf: str,
        indices: torch.Tensor,
        originals: torch.Tensor,
        dtype: torch.dtype,
        offmask_uses: int = 0,
        computes_weight_grad: bool = False,
    ) -> None:
        super().__init__()
        self.computes_weight_grad = computes_weight_grad
        self.leaf = leaf
        # Absolute weights, not deltas: replay is exact, and decay means what it means in full runs.
        self.register_parameter(leaf, nn.Parameter(originals.to(dtype, copy=True)))
        # Not persistent: FSDP's loader cannot shard buffers, and the adapter file packs indices.
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("originals", originals, persistent=False)
        self._tiles: Tiles | None = None
        self.offmask = OffMaskNorm(self, offmask_uses) if offmask_uses else None
        self.observer: Observer | None = None  # sees each use's gradient, dense and compact
        self.scout: Callable[[torch.Tensor], Any] | None = None  # takes the dense one; none is left

    @property
    def values(self) -> nn.Parameter:
        """The trainable entries, (nnz,) float32 or bfloat16."""
        values = self._parameters[self.leaf]
        assert values is not None
        return values

    @property
    def watched(self) -> bool:
        """Whether somebody looks at the dense gradient, which is then in the weight's dtype."""
        return any(one is not None for one in (self.offmask, self.observer, self.scout))

    @property
    def base_checksum(self) -> str:
        """Checksum of the base's entries, as in a mask file; computed when asked for."""
        return checksum(self.originals)

    def reseat(self, indices: torch.Tensor, originals: torch.Tensor) -> None:
        """Give it other entries, as many, at the base's values; the parameter stays the same one.

        Args:
            indices: (nnz,) int64, strictly increasing flat positions.
            originals: (nnz,) the base's entries there; the weight must hold the base's values.
        """
        self.indices, self.originals = indices, originals
        self.values.data.copy_(originals)
        self._tiles = None

    def tiles(self, rows: int, cols: int) -> Tiles:
        """Return the entries as the kernel of `weight_grad` reads them, made at the first call.

        Args:
            rows: Of the weight.
            cols: Of the weight.
        """
        if self._tiles is None or self._tiles.bits.device != self.indices.device:
            self._tiles = encode_tiles(self.indices, rows, cols)
        return self._tiles

    def mask_id(self) -> torch.Tensor:
        """Identify the indices, shape () int64; stored where values are saved without them."""
        digest = blake2b(self.indices.cpu().numpy().tobytes(), digest_size=8).digest()
        return torch.tensor(int.from_bytes(digest, "little", signed=True))

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        saved = state_dict.pop(prefix + MASK_ID, None)
        if saved is not None and not torch.equal(saved.cpu(), self.mask_id()):
            raise MaskMismatchError(
                f"{prefix.removesuffix('.')}: expected a checkpoint of this mask, found one of "
                "another mask; resume with the mask the run was started with"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the count in a printed model."""
        return f"nnz={self.indices.numel()}"
