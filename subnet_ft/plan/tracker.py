"""How much memory exists at each place of a training step: torch's MemTracker, asked by place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

from subnet_ft.gradient_release import ReleasedGradient

# (phase, layer): a layer counted from the nearer end, -1 is the last; None: outside all layers.
Place = tuple[str, int | None]


class Tracker(MemTracker):
    """Notes the most memory, and the gradients' part of it, at each place of a step.

    Args:
        layers: The decoder layers, in order.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.peaks: dict[Place, tuple[int, int]] = {}
        self.phase = ""
        self.layer: int | None = None
        self._handles = [
            handle
            for number, layer in enumerate(layers)
            for handle in self._watch(layer, _from_nearer_end(number, len(layers)))
        ]

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Tell gradients of these from what else backward makes."""
        for parameter in parameters:
            self._track_module_params_and_buffers(nn.ParameterList([parameter]))

    def enter(self, phase: str) -> None:
        """Say what is done next, outside the layers until one is entered."""
        self.phase, self.layer = phase, None

    def _watch(self, layer: nn.Module, number: int) -> list[Any]:
        """Follow the step in and out of a layer: forward by hooks, backward by its output's."""

        def enter(*args: Any) -> None:
            self.layer = number

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(enter)
            if self.phase != "backward":
                self.layer = None

        return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a fake tensor has no value; the code asks for counts of steps alone
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _update_peak_stats(self, peak_state: Any) -> None:
        # Ours is by place, and quicker by far than MemTracker's by module.
        for snapshot in self._curr_mem_snap.values():
            place, total = (self.phase, self.layer), snapshot["Total"]
            if total > self.peaks.get(place, (0, 0))[0]:
                self.peaks[place] = (total, snapshot[_MemRefType.GRAD])

    def _update_and_maybe_create_winfos(self, t: Any, *args: Any, **kwargs: Any) -> set[Any]:
        if t is None or isinstance(t, ReleasedGradient):  # stepped and dropped already
            return set()
        found: set[Any] = super()._update_and_maybe_create_winfos(t, *args, **kwargs)
        return found

    def _track(self, reftype: Any, t: torch.Tensor) -> None:
        if not isinstance(t, ReleasedGradient):
            super()._track(reftype, t)

    # What MemTracker notes of each module is not asked for, and refuses a second forward pass.

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None: ...

    def _post_fw_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None: ...

    def _pre_bw_hook(self, module: nn.Module, args: Any) -> None: ...

    def _post_bw_hook(self, module: nn.Module, args: Any) -> None: ...


def _from_nearer_end(number: int, count: int) -> int:
    return number if number < count // 2 else number - count
