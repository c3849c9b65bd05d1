"""Points PEFT's own tests at SubnetConfig; a pytest plugin, loaded by `tests.peft_suite.run`.

Their parametrized lists of (model, config class, arguments) are replaced before collection, and of
what is collected only that is kept which has our class among its parameters.
"""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

# A test module imports a diffusion pipeline that none of the tests here uses.
diffusers = types.ModuleType("diffusers")
diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
sys.modules.setdefault("diffusers", diffusers)

import local_models  # noqa: E402  (ours, copied beside this plugin)
import tests.test_custom_models as custom  # noqa: E402  (PEFT's, as the next four)
import tests.test_decoder_models as decoder  # noqa: E402
import tests.test_encoder_decoder_models as encoder_decoder  # noqa: E402
import tests.test_feature_extraction_models as feature_extraction  # noqa: E402
import tests.test_seq_classifier as seq_classifier  # noqa: E402

import subnet_ft  # noqa: E402
from subnet_ft.adapter.inject import sidecar_layers  # noqa: E402
from subnet_ft.adapter.model import SubnetModel  # noqa: E402


class SubnetConfig(subnet_ft.SubnetConfig):
    """Takes PEFT's words: modules for parameters, and a start that is not the base's own values."""

    def __init__(
        self,
        *args: Any,
        target_modules: list[str] | str | None = None,
        init_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if target_modules is not None:
            names = [target_modules] if isinstance(target_modules, str) else target_modules
            kwargs["include"] = [rf"(.*\.)?{re.escape(name)}\.weight" for name in names]
        super().__init__(*args, **{"density": 0.3, **kwargs})
        self._noise = not init_weights


_inject = SubnetModel.inject_adapter


def inject_with_noise(
    self: SubnetModel, model: Any, adapter_name: str, *rest: Any, **kw: Any
) -> None:
    """Inject, and start away from the base where a test asks for ``init_weights=False``."""
    _inject(self, model, adapter_name, *rest, **kw)
    if getattr(self.peft_config[adapter_name], "_noise", False):
        for layer in sidecar_layers(model):
            if subnet := layer.subnet(adapter_name):
                with torch.no_grad():
                    subnet.values.add_(torch.randn_like(subnet.values))
                layer.flush()


SubnetModel.inject_adapter = inject_with_noise  # type: ignore[method-assign]

_deep_mlp = custom.DeepMLP


def same_deep_mlp(*args: Any, **kwargs: Any) -> torch.nn.Module:
    """Build their model with the same weights each time: an adapter refuses another base."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _deep_mlp(*args, **kwargs)


custom.DeepMLP = same_deep_mlp

PARAMETERS: dict[str, list[list[str]]] = {
    "MLP": [["lin0.weight"], ["lin0.weight", "lin0.bias"], ["lin1.weight"], ["lin.\\.weight"]],
    "EmbConv1D": [["emb.weight"], ["conv1d.weight"], ["emb.weight", "conv1d.weight"]],
    "Conv1d": [["conv1d.weight"]],
    "Conv2d": [["conv2d.weight"], ["conv2d.weight", "lin0.weight"]],
    "Conv2dGroups": [["conv2d.weight"]],
    "Conv3d": [["conv3d.weight"]],
    "MLP_LayerNorm": [
        ["layernorm0.weight", "layernorm0.bias"],
        ["lin0.weight", "layernorm0.weight"],
    ],
    "MHA": [["mha.in_proj_weight"], ["mha.out_proj.weight"]],
    "MlpUsingParameters": [["lin0.weight"], ["lin0.weight", "lin1.weight"]],
}
custom.TEST_CASES[:] = [
    (f"{model} {' '.join(names)}", model, SubnetConfig, {"include": names})
    for model, sets in PARAMETERS.items()
    for names in sets
] + [("MLP to save", "MLP", SubnetConfig, {"include": "lin0.weight", "modules_to_save": ["lin1"]})]
custom.ALL_PEFT_CONFIG_CLASSES[:] = [SubnetConfig]


def _pair(first: str, second: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return tuple({"include": name, "init_weights": False} for name in (first, second))  # type: ignore[return-value]


custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    ("Subnet same", "subnet", SubnetConfig, *_pair("lin0.weight", "lin0.weight")),
    ("Subnet different", "subnet", SubnetConfig, *_pair("lin0.weight", "lin1.weight")),
]

DIRECTORIES = local_models.build(Path("models"))
decoder.PEFT_DECODER_MODELS_TO_TEST[:] = DIRECTORIES["decoder"]
encoder_decoder.PEFT_ENCODER_DECODER_MODELS_TO_TEST[:] = DIRECTORIES["encoder_decoder"]
feature_extraction.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = DIRECTORIES["feature_extraction"]
seq_classifier.PEFT_SEQ_CLS_MODELS_TO_TEST[:] = DIRECTORIES["seq_classifier"]
for module, options in (
    (decoder, {"task_type": "CAUSAL_LM"}),
    (encoder_decoder, {"task_type": "SEQ_2_SEQ_LM"}),
    (feature_extraction, {"task_type": "FEATURE_EXTRACTION", "exclude": "pooler.*"}),  # not used
    (seq_classifier, {"task_type": "SEQ_CLS"}),
):
    module.ALL_CONFIGS[:] = [(SubnetConfig, options)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what is about our config."""

    def is_ours(item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)
        return call is not None and any(
            value is SubnetConfig or isinstance(value, SubnetConfig)
            for value in call.params.values()
        )

    others = [item for item in items if not is_ours(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if is_ours(item)]
