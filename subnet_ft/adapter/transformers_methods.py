"""transformers' own adapter methods on a model of ours: ``load_adapter``, ``delete_adapter``.

Loading, also ``from_pretrained`` of an adapter directory, injects what an adapter's config says and
then loads values into that by name. Our entries are named by the adapter file, so the second half
is left to PEFT, which asks us (`state.unpack`).
"""

from types import MethodType
from typing import Any

import torch
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers.modeling_utils import load_state_dict
from transformers.utils.loading_report import LoadStateDictInfo

from subnet_ft.adapter.config import SubnetConfig
from subnet_ft.adapter.inject import detach, sidecar_layers
from subnet_ft.adapter_file import PREFIX

_LOAD, _DELETE = "_load_pretrained_model", "delete_adapter"


def install(root: nn.Module) -> None:
    """Make both do what our adapters need; other types' are left alone.

    Args:
        root: The base model; left alone if it is no transformers model.
    """
    if hasattr(root, _LOAD):
        root.__dict__[_LOAD] = MethodType(_load, root)
        root.__dict__[_DELETE] = MethodType(_delete, root)


def uninstall(root: nn.Module) -> None:
    """Undo `install`."""
    for name in (_LOAD, _DELETE):
        root.__dict__.pop(name, None)


def _load(
    root: Any,
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None,
    checkpoint_files: list[str] | None,
    load_config: Any,
    **kwargs: Any,
) -> tuple[LoadStateDictInfo, Any]:
    name, config = list(root.peft_config.items())[-1]  # the one that was just injected
    if not isinstance(config, SubnetConfig):
        result: tuple[LoadStateDictInfo, Any] = getattr(type(root), _LOAD)(
            model, state_dict, checkpoint_files, load_config, **kwargs
        )
        return result
    if state_dict is None:
        state_dict = {}
        for file in checkpoint_files or ():
            state_dict |= load_state_dict(file)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
    try:
        set_peft_model_state_dict(root, tensors, name)
        root.set_adapter(name)
    except Exception:
        root.delete_adapter(name)
        raise
    return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None


def _delete(root: Any, adapter_names: list[str] | str) -> None:
    type(root).delete_adapter(root, adapter_names)
    empty = [layer for layer in sidecar_layers(root) if not layer.subnet_ft_values]
    detach(empty, keep_values=False)
