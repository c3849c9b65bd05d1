"""From values to the sidecar they belong to."""

import torch

from subnet_ft.adapter.layer import ALIVE, SubnetLayer


class Registry:
    """Finds the sidecar of live values; made anew on a miss or when a sidecar's are others now."""

    def __init__(self) -> None:
        self._layers: dict[int, SubnetLayer] = {}

    def layer(self, values: torch.Tensor) -> SubnetLayer | None:
        """Return the sidecar whose live values these are, None if they are none's."""
        found = self._layers.get(id(values))
        if found is None or all(s._parameters[s.leaf] is not values for s in found.live_subnets):
            self._layers = live_layers()
            found = self._layers.get(id(values))
        return found


def live_layers() -> dict[int, SubnetLayer]:
    """Return every sidecar in the process under the ``id`` of each of its live values."""
    return {
        id(subnet._parameters[subnet.leaf]): layer
        for layer in ALIVE
        for subnet in layer.live_subnets
    }


def layers_of(optimizer: torch.optim.Optimizer) -> list[SubnetLayer]:
    """Return the sidecars whose live values an optimizer holds, each once."""
    layers = live_layers()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return list(dict.fromkeys(layers[key] for key in held if key in layers))
