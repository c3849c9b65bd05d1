"""SubnetCallback: a subnetwork in any ``transformers.Trainer`` script, by one line."""

import logging
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from subnet_ft.adapter import SubnetConfig, SubnetModel
from subnet_ft.adapter.drift import drifted, off_mask_sums
from subnet_ft.adapter.inject import sidecar_layers
from subnet_ft.adapter.subnet import MASK_ID, Subnet
from subnet_ft.errors import ConfigError
from subnet_ft.mask import SubnetMask
from subnet_ft.meter import SubnetMeterCallback, add_to_logs

logger = logging.getLogger(__name__)

ADAPTER = "default"


class SubnetCallback(SubnetMeterCallback):
    """Turns full finetuning into subnetwork finetuning: ``Trainer(..., callbacks=[this])``.

    The model is masked when the Trainer is made, before it builds its optimizer. Checkpoints hold
    the adapter (``adapter_model.safetensors``, loadable with PEFT) and resume by
    ``trainer.train(resume_from_checkpoint=...)``, for which they also hold a ``model.safetensors``
    of the trained values alone, the file the Trainer looks for. Logs gain ``subnet_density`` and,
    from the first save on, ``subnet_drifted_tensors``: in how many tensors weights outside the mask
    moved, which must be 0; and the learning meter's figures, see `SubnetMeterCallback`.

    Use a PeftModel (``peft_config=SubnetConfig(...)``) instead where the trainer treats adapters
    specially: DPO, KTO, GRPO with a reference model (a PeftModel needs no second model, with a
    callback TRL loads one), weight sync to vLLM, and quantized bases.

    Args:
        mask: A mask, the path of a mask file, or a `SubnetConfig` for anything beyond a mask.
        save_merged: Directory for the full finetuned model, an ordinary Hugging Face one, written
            when training ends.

    Example:
        >>> Trainer(model, args, callbacks=[SubnetCallback("mask.safetensors")])  # doctest: +SKIP
    """

    def __init__(
        self,
        mask: SubnetMask | SubnetConfig | str | PathLike[str],
        *,
        save_merged: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.config = mask if isinstance(mask, SubnetConfig) else SubnetConfig(mask=mask)
        self.save_merged = None if save_merged is None else Path(save_merged)
        self._check_save_merged()
        if self.config.modules_to_save or self.config.trainable_token_indices:
            raise ConfigError(
                "SubnetCallback: expected masked entries alone, found modules_to_save or "
                "trainable_token_indices, which its checkpoints cannot hold; use "
                "peft_config=SubnetConfig(...)"
            )
        self.density = 0.0
        self._sums: dict[str, int] = {}
        self._drift: int | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the subnetwork to the Trainer's model.

        Raises:
            ConfigError: The model is a PeftModel or already has an adapter, an optimizer was built
                before the callback could run, or the trainer sends its trainable parameters
                elsewhere (async GRPO, ``sync_ref_model``).
        """
        model: nn.Module = kwargs["model"]
        if type(args).__name__ == "AsyncGRPOConfig":
            raise ConfigError(
                "SubnetCallback: expected a trainer that keeps its weights to itself, found "
                "AsyncGRPOTrainer, which sends a plain model's trainable parameters to vLLM: "
                "compact values, not weights; use peft_config=SubnetConfig(...)"
            )
        if getattr(args, "sync_ref_model", False):
            raise ConfigError(
                "SubnetCallback: expected a reference model that stays as it is, found "
                "sync_ref_model=True, which mixes trainable parameters into it one by one; "
                "use sync_ref_model=False"
            )
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "SubnetCallback: expected a plain model, found one with an adapter; use either the "
                "callback or peft_config=SubnetConfig(...)"
            )
        if kwargs.get("optimizer") is not None:
            raise ConfigError(
                "SubnetCallback: expected the Trainer to build its optimizer, found one passed by "
                "optimizers= for the dense parameters; choose it by args.optim"
            )
        if self.config.base_model_name_or_path is None:
            self.config.base_model_name_or_path = getattr(model, "name_or_path", None)
        SubnetModel(model, {ADAPTER: self.config}, ADAPTER)
        # transformers' own mark of an injected adapter: save_pretrained then writes the adapter.
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
        model.register_load_state_dict_post_hook(_expect_values_only)
        layers = list(sidecar_layers(model))
        nnz = sum(s.indices.numel() for layer in layers for s in layer.subnets())
        self.density = nnz / sum(p.numel() for p in _base_parameters(model))
        logger.info("subnetwork: %d of the model's weights train, density %.4f", nnz, self.density)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the optimizer trains the subnetwork, and note the weights outside it.

        Raises:
            ConfigError: The optimizer does not hold the subnetwork's values.
        """
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        values = [s.values for layer in sidecar_layers(model) for s in layer.subnets()]
        if not values or not all(id(v) in held for v in values):
            raise ConfigError(
                "SubnetCallback: expected an optimizer over the subnetwork's values, found one made"
                " before they existed; pass the callback to the Trainer's constructor and no "
                "optimizers="
            )
        self._check_save_merged()
        self._sums = off_mask_sums(model)
        super().on_train_begin(args, state, control, **kwargs)

    def _check_save_merged(self) -> None:
        if self.save_merged is not None and self.save_merged.exists():
            raise ConfigError(
                f"save_merged: expected a new directory, found {self.save_merged}; "
                "move it or choose another"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the checkpoint for resuming, and check for drift."""
        model = kwargs["model"]
        self._check_drift(model)
        if args.should_save:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            part = directory / f"{SAFE_WEIGHTS_NAME}.part"
            save_file(_values(model), part, {"format": "pt"})
            part.replace(directory / SAFE_WEIGHTS_NAME)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add density, drift and the meter's figures to the logs."""
        extra: dict[str, float] = {"subnet_density": self.density}
        if self._drift is not None:
            extra["subnet_drifted_tensors"] = self._drift
        add_to_logs(state, kwargs.get("logs"), extra)
        super().on_log(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check for drift and write the merged model if asked to."""
        model = kwargs["model"]
        self._check_drift(model)
        if self.save_merged is not None and args.should_save:
            save_merged_model(model, self.save_merged, kwargs.get("processing_class"))

    def _check_drift(self, model: nn.Module) -> None:
        moved = drifted(self._sums, off_mask_sums(model))
        self._drift = len(moved)
        if moved:
            logger.warning(
                "weights outside the mask moved in %d tensors, first %s: what writes them?",
                len(moved),
                moved[0],
            )


def save_merged_model(model: PreTrainedModel, directory: Path, processor: Any = None) -> None:
    """Write the model with its live values as an ordinary Hugging Face model directory.

    Args:
        model: A model with an injected adapter; not changed.
        directory: Where to; made under a temporary name first.
        processor: Tokenizer or processor to save beside it.
    """
    part = directory.with_name(f".{directory.name}.part")
    state = {k: v for k, v in model.state_dict().items() if SubnetModel.prefix not in k}
    marked = model._hf_peft_config_loaded
    model._hf_peft_config_loaded = False  # else save_pretrained writes the adapter alone
    try:
        model.save_pretrained(part, state_dict=state)
    finally:
        model._hf_peft_config_loaded = marked
    if processor is not None:
        processor.save_pretrained(part)
    part.rename(directory)


def _expect_values_only(model: nn.Module, keys: Any) -> None:
    """A checkpoint leaves the base's own weights out on purpose: no warning about them."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if SubnetModel.prefix in key]


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Collect what a plain ``load_state_dict`` needs, and the mask's identity to check it by."""
    values = {k: v for k, v in model.state_dict().items() if SubnetModel.prefix in k}
    for name, module in model.named_modules():
        if isinstance(module, Subnet):
            values[f"{name}.{MASK_ID}"] = module.mask_id()
    return values


def _base_parameters(model: nn.Module) -> list[torch.Tensor]:
    ours = {id(p) for layer in sidecar_layers(model) for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in ours and p.is_floating_point()]
