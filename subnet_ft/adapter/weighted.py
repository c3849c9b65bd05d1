"""A new adapter that is the weighted sum of others."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from subnet_ft.adapter.config import FROM_FILE
from subnet_ft.adapter.inject import Entries, attach, sidecar_layers
from subnet_ft.adapter.kept_dtype import keep_values
from subnet_ft.adapter.writing import compose
from subnet_ft.errors import ConfigError

if TYPE_CHECKING:
    from subnet_ft.adapter.config import SubnetConfig
    from subnet_ft.adapter.model import SubnetModel

COMBINATIONS = ("linear",)


def add(model: "SubnetModel", adapters: Sequence[str], weights: Sequence[float], new: str) -> None:
    """Give adapter ``new`` what `writing.compose` makes of the others; see `SubnetModel`."""
    config = model.peft_config[new] = _config(model, adapters)
    for layer in list(sidecar_layers(model.model)):
        terms = [
            (subnet, weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if (subnet := layer.subnet(adapter)) is not None
        ]
        if not terms:
            continue
        indices, originals, values = compose(*zip(*terms, strict=True))
        entries = Entries(layer.name, list(layer.owners), indices, originals)
        subnet = attach(entries, new, **config.entry_options).subnets((new,))[0]
        subnet.values.data.copy_(values)
        subnet.requires_grad_(False)  # as LoRA's: it trains once it is the active one
    keep_values(model.model)
    nnz = sum(s.indices.numel() for la in sidecar_layers(model.model) if (s := la.subnet(new)))
    config.density = nnz / sum(math.prod(shape) for shape in config._shapes.values())


def check(
    model: "SubnetModel",
    adapters: Sequence[str],
    weights: Sequence[float],
    new: str,
    combination: str,
) -> None:
    """Refuse what cannot be summed.

    Raises:
        ConfigError: See `SubnetModel.add_weighted_adapter`.
    """
    known = model.peft_config
    missing = [name for name in adapters if name not in known]
    if missing or not adapters:
        raise ConfigError(
            f"adapters: expected names among {list(known)}, found {missing or list(adapters)}; "
            "add or load them first"
        )
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"weights: expected {len(adapters)} finite numbers, one an adapter, found "
            f"{list(weights)}; give as many"
        )
    if new in known:
        raise ConfigError(
            f"adapter_name: expected a new name, found {new!r}, which exists; delete_adapter it "
            "first or choose another"
        )
    if combination not in COMBINATIONS:
        raise ConfigError(
            f"combination_type: expected one of {COMBINATIONS}, found {combination!r}; use "
            "one of those"
        )
    for name in adapters:
        config = known[name]
        if config._pending:
            raise ConfigError(
                f"adapter {name!r}: expected entries, found none yet; load its adapter file first"
            )
        if config.modules_to_save or config.trainable_token_indices:
            raise ConfigError(
                f"adapter {name!r}: expected entries alone, found modules_to_save or "
                "trainable_token_indices, which train whole and have no sum; merge instead"
            )


def _config(model: "SubnetModel", adapters: Sequence[str]) -> "SubnetConfig":
    """Return a recipe that says where the entries are: in the adapter, to be saved with it."""
    configs = [model.peft_config[name] for name in adapters]
    config = replace(
        configs[0],
        selector=FROM_FILE,
        include=None,
        exclude=None,
        values_dtype="float32",
    )
    first, *others = (c._source for c in configs)
    config._source = {
        key: text for key, text in first.items() if all(o.get(key) == text for o in others)
    }
    config._shapes = {name: shape for c in configs for name, shape in c._shapes.items()}
    return config
