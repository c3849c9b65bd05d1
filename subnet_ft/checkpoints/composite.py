"""Models of several parts, such as vision and language: stored under other names than they have.

transformers renames what it loads, by the model's class, and renames it back as it saves. Its own
table is asked; imported for such models alone, since that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_PARTS = ("text_config", "vision_config", "audio_config")


def model_names(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Return what maps the name of a stored tensor to the parameter's in the model.

    Args:
        config: The checkpoint's config.json.
    """
    architectures = config.get("architectures")
    if not architectures or not any(isinstance(config.get(part), Mapping) for part in _PARTS):
        return lambda key: key
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    cls = getattr(transformers, architectures[0], None)
    if cls is None:
        return lambda key: key
    with torch.device("meta"):
        model = cls(cls.config_class.from_dict(dict(config)))
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    named = {name for name, _ in model.named_parameters()}

    def name_of(key: str) -> str:
        renamed = key
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        return key if key in named else renamed

    return name_of
