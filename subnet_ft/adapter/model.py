"""SubnetModel: PEFT's tuner for subnetworks."""

import logging
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from peft.utils.other import set_additional_trainable_modules
from peft.utils.peft_types import register_peft_method
from torch import nn

from subnet_ft.adapter import state, step_hooks, weighted
from subnet_ft.adapter.config import FROM_FILE, SubnetConfig
from subnet_ft.adapter.dequantized import to_full_precision
from subnet_ft.adapter.guards import guard, unguard
from subnet_ft.adapter.inject import Entries, attach, detach, plan, sidecar_layers
from subnet_ft.adapter.kept_dtype import keep_values
from subnet_ft.adapter.layer import SubnetLayer
from subnet_ft.adapter.targets import check_enclosed, filter_mask, saved_whole, target_shapes
from subnet_ft.adapter.writing import flush_all
from subnet_ft.selectors import SELECTORS

logger = logging.getLogger(__name__)


class SubnetModel(BaseTuner):
    """Trains chosen entries of a model's weights in place; made by ``peft.get_peft_model``.

    Every masked parameter gets a `SubnetLayer` beside it, inside the module that owns it; the
    modules themselves are not replaced.

    Args:
        model: The base model, changed in place.
        peft_config: Adapter name -> `SubnetConfig`.
        adapter_name: Which of them to attach first.
        low_cpu_mem_usage: As in PEFT.
        state_dict: As in PEFT; not used.
    """

    prefix = "subnet_ft_"
    tuner_layer_cls = SubnetLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's attribute)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach an adapter's entries; everything is checked before anything is changed.

        Raises:
            SubnetError: The mask does not fit the model; see `subnet_ft.adapter.inject.plan`.
        """
        step_hooks.install()
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        entries = self._entries(model, config, adapter_name)
        check_enclosed(model, config, entries)
        first = not any(True for _ in sidecar_layers(model))
        trained = [(p, p.requires_grad) for p in model.parameters()]
        guard(model)
        for layer in sidecar_layers(model):
            if layer.subnet(adapter_name):  # wrapped before under this name, now replaced
                layer.delete_adapter(adapter_name)
        for one in entries:
            attach(one, adapter_name, **config.entry_options)
        keep_values(model)
        self.targeted_parameter_names += [
            one.name for one in entries if one.name not in self.targeted_parameter_names
        ]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        if not first:  # a further adapter leaves alone what was trained before it
            for parameter, requires_grad in trained:
                parameter.requires_grad = requires_grad

    def _entries(self, model: nn.Module, config: SubnetConfig, adapter_name: str) -> list[Entries]:
        """Find an adapter's entries: another adapter's, the mask's, a selector's or none yet."""
        copied = self._same_recipe(model, config, adapter_name)
        if copied is not None:  # as TRL's "ref": same entries, nothing to read or draw again
            return [
                Entries(layer.name, list(layer.owners), subnet.indices, subnet.originals)
                for layer in sidecar_layers(model)
                if (subnet := layer.subnet(copied)) is not None
            ]
        dtype = config.entry_options["dtype"]
        whole = saved_whole(model, config.modules_to_save)
        if config._mask is not None:
            mask = filter_mask(model, config._mask, config.include, config.exclude)
            config._shapes = {n: shape for n, shape in mask.shapes.items() if n not in whole}
            chosen = {name: mask[name] for name in mask if name not in whole}
            if left_out := len(mask) - len(chosen):
                logger.info("%d masked parameters are in modules_to_save: whole", left_out)
            return plan(model, chosen, mask.shapes, mask.checksums, dtype)
        if config.selector == FROM_FILE or config.inference_mode:
            config._pending = True  # the adapter file, about to be loaded, names its entries
            return []
        shapes = target_shapes(model, config.include, config.exclude)
        shapes = {name: shape for name, shape in shapes.items() if name not in whole}
        mask = SELECTORS[config.selector](shapes, config.density, config.seed)
        config._source, config._shapes = dict(mask.metadata), shapes
        entries = plan(model, mask, shapes, {}, dtype)
        logger.warning(  # a choice made for the user is said where they see it
            "no mask given: training a %s %.3g%% of each of %d parameters (%s), %d weights in all; "
            "extract_mask takes a mask from a finished run",
            config.selector,
            100 * config.density,
            len(shapes),
            config.include or "all-linear",
            mask.nnz,
        )
        return entries

    def _same_recipe(self, model: nn.Module, config: SubnetConfig, adapter_name: str) -> str | None:
        attached = {name for layer in sidecar_layers(model) for name in layer.subnet_ft_values}
        others = attached - {adapter_name}
        return next((n for n in others if self.peft_config.get(n) is config), None)

    def flush(self) -> None:
        """Write the live values into the weights, after they were changed by hand.

        The optimizer step, loading and switching do this by themselves.
        """
        flush_all(list(sidecar_layers(self.model)))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add the weighted sum of several adapters as a new one, as LoRA's method does.

        It has an entry wherever one of them has, with the value original + sum of weight * (value
        - original) in fp32: with weights of 1 what the adapters give when active together, to the
        bit. An entry of one adapter alone with weight 1 keeps its value, to the bit. What is
        active stays so; the rest of the new adapter's recipe is the first one's.

        Args:
            adapters: Names of adapters of this model.
            weights: One for each; negative ones subtract.
            adapter_name: Of the new adapter.
            combination_type: ``"linear"``.

        Raises:
            ConfigError: An unknown adapter, one without entries or with modules trained whole, an
                adapter of the new name, not as many weights as adapters, or another combination.
        """
        weighted.check(self, adapters, weights, adapter_name, combination_type)
        weighted.add(self, adapters, weights, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; its entries return to the base's values unless another one is live."""
        super().delete_adapter(adapter_name)
        detach(
            [layer for layer in sidecar_layers(self.model) if not layer.subnet_ft_values],
            keep_values=False,
        )

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Keep the named adapters in the weights until `unmerge_adapter`, whichever are active.

        The values of a quantized weight stay beside it, as when they are active: it is not
        quantized again.
        """
        super().merge_adapter(adapter_names, safe_merge)
        if not all(layer.in_place for layer in sidecar_layers(self.model)):
            logger.warning(
                "merge_adapter: quantized weights hold no values, which stay beside them; whoever "
                "reads the weights themselves needs merge_and_unload()"
            )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = list(sidecar_layers(self.model))
        if merge:
            for layer in layers:
                layer._disable_adapters = False  # merging means it, also inside disable_adapter
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                if not layer.merged_adapters:  # what is live there was not asked for
                    layer.enable_adapters(False)
        detach(layers, keep_values=merge)
        unguard(self.model)
        if merge:
            to_full_precision(self.model, layers)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _check_merge_allowed(self) -> None:
        """Tied weights merge exactly: there is one tensor, and it holds the values already."""

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Tied weights are one parameter here."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Values are fp32 already and originals keep the weight's dtype; PEFT would upcast both."""

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("inject_adapter works on parameters and replaces no module")

    # The adapter file; see `subnet_ft.adapter.state`.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SubnetConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return state.pack(model, config, adapter_name, selected)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SubnetConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        state_dict = state.unpack(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


if PeftType.SUBNET_FT not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="subnet_ft", config_cls=SubnetConfig, model_cls=SubnetModel)
