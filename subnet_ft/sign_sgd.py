"""signSGD on one weight, with one byte an entry: AdamW without its memory (arXiv 1802.04434)."""

import torch

from subnet_ft.selectors import largest_entries


class SignSGD:
    """Moves a weight by a rate against the signs of its gradients, which are not kept.

    The votes of an entry, the sum of its signs, say where it is: at base - rate * votes, rounded to
    the weight's dtype once. So steps far below a bf16 weight's last bit add up. They end at 127.

    Args:
        weight: Any shape; moved in place.
        rate: How far one vote moves an entry.
    """

    def __init__(self, weight: torch.Tensor, rate: float) -> None:
        self.weight, self.rate = weight, rate
        self.base = weight.clone()
        self.votes = torch.zeros_like(weight, dtype=torch.int8)
        self._check = torch.zeros((), device=weight.device)

    def count(self, gradient: torch.Tensor) -> None:
        """Take in a dense gradient; may be called from within backward."""
        signs = gradient.sign().to(torch.int8)
        self.votes += signs
        self.votes -= signs * (self.votes == -128)  # from 127 or -127: back to it
        self._check += gradient.sum(dtype=torch.float32) * 0  # stays 0 while all is finite

    def move(self) -> None:
        """Make the weight what the votes so far say."""
        self.weight.copy_(self.base + self.votes.float() * -self.rate)

    def undo(self) -> None:
        """Make the weight the base's again."""
        self.weight.copy_(self.base)

    def finite(self) -> bool:
        """Tell whether every gradient was."""
        return self._check.item() == 0

    def furthest(self, nnz: int, generator: torch.Generator) -> torch.Tensor:
        """Find the entries that moved furthest; of those as far, some at random.

        Args:
            nnz: How many.
            generator: On the CPU.

        Returns:
            (nnz,) int64, strictly increasing flat positions.
        """
        draws = torch.rand(self.votes.shape, generator=generator).to(self.votes.device)
        return largest_entries(self.votes.abs() + draws, nnz)

    def drift(self, indices: torch.Tensor) -> torch.Tensor:
        """Return how far entries have moved, (nnz,) float32.

        Args:
            indices: (nnz,) int64, flat positions.
        """
        return self.votes.view(-1)[indices].float() * -self.rate
