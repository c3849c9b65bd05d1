"""Dense training restricted to a mask, without any of the library's code: the oracle.

The rules are those of the design's table of exact equalities: fp32 master weights; the gradient of
a weight used twice is the fp32 sum of both uses'; the clip norm is taken over ``grad[mask]`` tensor
by tensor in the model's order; the optimizer sees dense tensors; off-mask entries keep their bits.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from subnet_ft.mask import SubnetMask


class DenseMaskedRun:
    """Trains ``model``'s masked entries with dense fp32 masters.

    Args:
        model: Its weights are overwritten by the masters, rounded, after every step.
        mask: Which entries may move.
        optimizer: Makes the optimizer from the dense masters.
        compact_step: Step ``master[mask]`` instead of the dense master, for an optimizer whose
            arithmetic depends on an entry's position.
        max_norm: Clip norm, None for no clipping.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: SubnetMask,
        optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
        *,
        compact_step: bool = False,
        max_norm: float | None = 1.0,
    ) -> None:
        self.model, self.max_norm, self.compact_step = model, max_norm, compact_step
        named = dict(model.named_parameters())
        self.weights = {name: named[name] for name in mask}
        self.inside = {}
        for name, weight in self.weights.items():
            inside = torch.zeros(weight.numel(), dtype=torch.bool)
            inside[mask[name].long()] = True
            self.inside[name] = inside.view_as(weight)
        self.masters = {n: nn.Parameter(w.detach().float()) for n, w in self.weights.items()}
        self.compact = {
            n: nn.Parameter(m.detach()[self.inside[n]]) for n, m in self.masters.items()
        }
        stepped = self.compact if compact_step else self.masters
        self.optimizer = optimizer(list(stepped.values()))
        model.requires_grad_(False)

    def gradients(self, micro_batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum each use's gradient in fp32, over uses and micro-batches."""
        tied = self.model.lm_head.weight is self.model.model.embed_tokens.weight
        total: dict[str, torch.Tensor] = {}
        batches = list(micro_batches)
        for ids in batches:
            uses = {n: [w] for n, w in self.weights.items()}
            if tied:  # an untied twin of the head, so that its use has a gradient of its own
                twin = nn.Parameter(self.model.lm_head.weight.detach().clone())
                self.model.lm_head.weight = twin
                uses["model.embed_tokens.weight"].append(twin)
            for weights in uses.values():
                for weight in weights:
                    weight.requires_grad_(True)
            (self.model(ids, labels=ids).loss / len(batches)).backward()
            for name, weights in uses.items():
                # autograd meets the head before the embedding on its way back
                grads = [w.grad.float() for w in reversed(weights) if w.grad is not None]
                step = grads[0] if len(grads) == 1 else grads[0] + grads[1]
                total[name] = total[name] + step if name in total else step
                for weight in weights:
                    weight.grad = None
                    weight.requires_grad_(False)
            if tied:
                self.model.lm_head.weight = self.model.model.embed_tokens.weight
        return total

    def step(self, *micro_batches: torch.Tensor) -> None:
        total = self.gradients(micro_batches)
        for name, parameter in self.compact.items():
            parameter.grad = total[name][self.inside[name]]
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.compact.values()), self.max_norm)
        before = {n: m.detach().clone() for n, m in self.masters.items()}
        for name, master in self.masters.items():
            master.grad = torch.zeros_like(master)
            master.grad[self.inside[name]] = self.compact[name].grad
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                inside = self.inside[name]
                if self.compact_step:
                    master[inside] = self.compact[name]
                master.copy_(torch.where(inside, master, before[name]))
                weight = self.weights[name]
                weight.copy_(torch.where(inside, master.to(weight.dtype), weight))
