"""SubnetConfig: what to train, as a ``PeftConfig``."""

from dataclasses import InitVar, dataclass, field
from os import PathLike
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils import PeftType

from subnet_ft.errors import ConfigError
from subnet_ft.mask import SubnetMask
from subnet_ft.selectors import SELECTORS

# The recipe of an adapter that came from a file: its entries are in the file, not drawn anew.
FROM_FILE = "file"
CLIPS = ("compact", "dense")
WEIGHT_GRADS = ("dense", "compact", "auto")
VALUES_DTYPES = ("float32", "bfloat16")


@dataclass
class SubnetConfig(PeftConfig):
    """Trains the masked entries of a model's weights in place and freezes everything else.

    Give a ``mask`` (all of it is trained), or none and a ``selector`` draws one. The mask never
    becomes part of the saved config: the adapter file holds the entries.

    Args:
        mask: A `SubnetMask` or the path of a mask file. None: use ``selector``.
        selector: Which entries without a mask: a name of `subnet_ft.selectors.SELECTORS`.
        density: Share of each targeted parameter's entries the selector keeps, in (0, 1].
        seed: Seed of a random selector.
        include: Regular expression(s), each matching whole names of base parameters
            (``model.layers.0.mlp.up_proj.weight``), or ``"all"``, or ``"all-linear"`` (weights of
            linear layers without the output head). Default: all of a mask; ``"all-linear"`` for a
            selector.
        exclude: Regular expression(s) of names to leave out.
        values_dtype: ``"float32"``, or ``"bfloat16"`` on a bf16 base, where values then equal the
            weight's own entries; needs `subnet_ft.SubnetAdamW` with ``master="residual"``.
        clip: ``"compact"``: gradient clipping sees the norm of the masked gradient. ``"dense"``: it
            sees the norm of the whole gradient of the masked parameters, as full finetuning's
            clipping does; exact without gradient accumulation, in one process, where each module
            runs once a forward pass.
        weight_grad: ``"dense"``: entries are gathered from a layer's dense gradient, bit for bit
            what full finetuning has there. ``"compact"``: linear layers compute the gradient at the
            entries alone and never hold a whole dense one, equal up to rounding; embeddings and
            all other modules still go the dense way. ``"auto"``: linear layers do where it pays,
            see `subnet_ft.adapter.linear.pays`.
        modules_to_save: Modules trained and saved whole beside the adapter, as in all of PEFT.

    Raises:
        ConfigError: A value outside what is listed.

    Example:
        >>> config = SubnetConfig(mask="mask.safetensors")  # doctest: +SKIP
        >>> config = SubnetConfig(selector="random", density=0.02)
    """

    mask: InitVar[SubnetMask | str | PathLike[str] | None] = None
    selector: str = field(default="random", metadata={"help": "Which entries, without a mask."})
    density: float = field(default=0.02, metadata={"help": "Share of entries a selector keeps."})
    seed: int = field(default=0, metadata={"help": "Seed of a random selector."})
    include: list[str] | str | None = field(
        default=None, metadata={"help": 'Parameter name regexes, "all" or "all-linear".'}
    )
    exclude: list[str] | str | None = field(
        default=None, metadata={"help": "Regexes of parameter names to leave out."}
    )
    values_dtype: str = field(
        default="float32", metadata={"help": 'Of the values: "float32" or "bfloat16".'}
    )
    clip: str = field(
        default="compact", metadata={"help": 'Gradient norm clipping sees: "compact" or "dense".'}
    )
    weight_grad: str = field(
        default="dense", metadata={"help": 'From the "dense" one (exact), "compact" or "auto".'}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole."}
    )
    # PEFT, TRL and transformers read these of any config without asking whether they exist.
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Not used."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not used."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Not used."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Not used."}
    )
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Not used."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings train whole."}
    )
    bias: str = field(default="none", metadata={"help": "Biases train when a mask names them."})
    init_weights: bool = field(default=True, metadata={"help": "Values start as the base's."})

    def __post_init__(self, mask: SubnetMask | str | PathLike[str] | None) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SUBNET_FT
        # Plain attributes, not fields: a saved config is a recipe and holds neither path nor mask.
        self._mask = SubnetMask.load(mask) if isinstance(mask, str | PathLike) else mask
        self._source: dict[str, str] = {} if self._mask is None else dict(self._mask.metadata)
        self._pending = False  # waits for an adapter file to name its entries
        # Every targeted parameter, those without an entry too: what the density is a share of.
        self._shapes: dict[str, tuple[int, ...]] = {}
        if self._mask is not None:
            self.selector = FROM_FILE
            self.density = self._mask.density
        if self.selector not in (*SELECTORS, FROM_FILE):
            raise ConfigError(
                f"selector: expected one of {sorted(SELECTORS)}, found {self.selector!r}"
            )
        if not 0 < self.density <= 1 and self.selector != FROM_FILE:
            raise ConfigError(f"density: expected a share in (0, 1], found {self.density}")
        if self.values_dtype not in VALUES_DTYPES:
            raise ConfigError(
                f"values_dtype: expected one of {VALUES_DTYPES}, found {self.values_dtype!r}"
            )
        if self.clip not in CLIPS:
            raise ConfigError(f"clip: expected one of {CLIPS}, found {self.clip!r}")
        if self.weight_grad not in WEIGHT_GRADS:
            raise ConfigError(
                f"weight_grad: expected one of {WEIGHT_GRADS}, found {self.weight_grad!r}"
            )
        if self.weight_grad != "dense" and self.clip == "dense":
            raise ConfigError(
                'clip="dense" reads the dense gradient: expected weight_grad="dense" with it, '
                f"found {self.weight_grad!r}; change either"
            )
        if self.bias != "none":
            raise ConfigError(
                f'bias: expected "none", found {self.bias!r}; name biases in the mask or in include'
            )
        for name in (
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
        ):
            given = getattr(self, name)
            if given or given == 0:
                raise ConfigError(
                    f"{name}: expected None, found {given!r}; a subnetwork is chosen by parameter "
                    "name: use include= and exclude="
                )

    @property
    def entry_options(self) -> dict[str, Any]:
        """What `subnet_ft.adapter.inject.attach` needs to know."""
        return {
            "dtype": getattr(torch, self.values_dtype),
            "offmask": self.clip == "dense",
            "weight_grad": self.weight_grad,
        }

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Mark a config read from an adapter directory: its entries come with the file."""
        return {**kwargs, "selector": FROM_FILE}
