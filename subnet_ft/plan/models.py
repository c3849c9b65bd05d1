"""Which model: a preset that needs no network, a directory or a hub id; only a config is read."""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from subnet_ft.errors import ConfigError, UnsupportedError

# Shapes as in the models' published config.json; what has no bearing on memory is left out.
PRESETS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text())


def load_config(model: str) -> PretrainedConfig:
    """Read a causal language model's config; no weights.

    Args:
        model: A preset's name, a model directory or a hub id.

    Raises:
        ConfigError: There is none of these.
        UnsupportedError: It is no causal language model, or a quantized one.
    """
    preset = {name.lower(): fields for name, fields in PRESETS.items()}.get(model.lower())
    if preset is not None:
        return AutoConfig.for_model(**preset)
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: expected a preset ({', '.join(PRESETS)}), a model directory or a hub id that "
            f"can be reached, found {model!r} ({str(error).splitlines()[0]})"
        ) from error
    config = config.get_text_config(decoder=True)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(
            f"{model}: expected a causal language model, found {config.model_type!r}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(
            f"{model}: expected a model in bf16, found a quantized one; plan its bf16 original"
        )
    return config


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Copy a config, with its first so many layers only."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    if getattr(shorter, "layer_types", None):
        shorter.layer_types = shorter.layer_types[:layers]
    return shorter
