"""`subnet-ft train`: TRL's own training scripts, on a subnetwork."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_args

import typer

from subnet_ft.cli.output import one_line_errors
from subnet_ft.errors import ConfigError

ALGORITHMS = ("sft", "dpo", "grpo", "kto", "rloo")
# Those of SubnetConfig's fields that choose and train a subnetwork; PEFT's own are not among them.
OPTIONS = (
    "selector",
    "density",
    "seed",
    "include",
    "exclude",
    "values_dtype",
    "clip",
    "weight_grad",
    "modules_to_save",
)
_PREFIX = "subnet_"
_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# Everything behind the algorithm's name is TRL's parser's, --help included.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

train = typer.Typer(
    help="Train a subnetwork by TRL's own scripts: all of TRL's options, and a --subnet_* group. "
    "`subnet-ft train sft --help` lists them; --config takes them from a YAML file. "
    "Several processes: accelerate launch --module subnet_ft.cli.main train ...",
    no_args_is_help=True,
)


def _command(algorithm: str) -> Callable[[typer.Context], None]:
    @one_line_errors
    def command(context: typer.Context) -> None:
        _run(algorithm, context.args)

    return command


for _algorithm in ALGORITHMS:
    _help = f"Run TRL's {_algorithm.upper()} script on a subnetwork."
    train.command(_algorithm, help=_help, context_settings=_PASS_ON)(_command(_algorithm))


def _run(algorithm: str, arguments: list[str]) -> None:
    try:
        script = import_module(f"trl.scripts.{algorithm}")
    except ImportError as error:
        raise ConfigError(
            f"expected TRL, found {error}; install it with pip install 'subnet-ft[trl]'"
        ) from error
    *trl_arguments, subnet = _parse(script, algorithm, arguments)
    script_arguments, _, model_arguments, dataset_arguments = trl_arguments
    _check(script_arguments, model_arguments, dataset_arguments)
    _accept_file(script_arguments, dataset_arguments)
    with _trainers_take(f"{algorithm.upper()}Trainer", _config(subnet)):
        script.main(*trl_arguments)


def _parse(script: Any, algorithm: str, arguments: list[str]) -> tuple[Any, ...]:
    """Parse as TRL does, with our group behind its own."""
    import yaml  # type: ignore[import-untyped]
    from trl import TrlParser

    groups = (*script.make_parser().dataclass_types, _subnet_arguments())
    parser = TrlParser(groups, prog=f"subnet-ft train {algorithm}")
    parser.error = _refuse  # argparse's own prints pages of usage before the reason
    if arguments[-1:] == ["--config"]:
        _refuse("--config: expected the path of a YAML file, found nothing")
    try:
        parsed: tuple[Any, ...] = parser.parse_args_and_config(arguments)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from error
    return parsed


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


def _subnet_arguments() -> type:
    """Make the --subnet_* group: names, types, defaults and help of SubnetConfig's own fields."""
    from subnet_ft.adapter import SubnetConfig

    known = {f.name: f for f in fields(SubnetConfig)}
    types: dict[str, Any] = {n: known[n].type for n in OPTIONS}
    # The parser knows no `list[str] | str`: one pattern is a list of one.
    types = {n: list[str] | None if list[str] in get_args(t) else t for n, t in types.items()}
    mask_help = {"help": "Mask file; all of it is trained. Without one, a selector draws a mask."}
    group = make_dataclass(
        "SubnetArguments",
        [
            (f"{_PREFIX}mask", str | None, field(default=None, metadata=mask_help)),
            *(
                (_PREFIX + n, types[n], field(default=known[n].default, metadata=known[n].metadata))
                for n in OPTIONS
            ),
        ],
    )
    group._argument_group_name = "subnet"  # type: ignore[attr-defined]
    return group


def _config(arguments: Any) -> Any:
    """Make the SubnetConfig that the --subnet_* group says.

    Raises:
        ConfigError: A value it cannot have, or options of a selector beside a mask.
    """
    from subnet_ft.adapter import SubnetConfig

    given = {name: getattr(arguments, _PREFIX + name) for name in OPTIONS}
    mask = arguments.subnet_mask
    for name in ("selector", "density", "seed"):
        if mask is not None and given[name] != getattr(SubnetConfig, name):
            _refuse(
                f"--subnet_mask, --subnet_{name}: expected one or the other, found both; "
                "all of a mask is trained"
            )
    for name in ("include", "exclude"):
        if isinstance(given[name], list) and len(given[name]) == 1:
            given[name] = given[name][0]
    return SubnetConfig(mask=mask, **given)


def _check(script_arguments: Any, model_arguments: Any, dataset_arguments: Any) -> None:
    """Refuse before anything is loaded what TRL would fail at later.

    Raises:
        ConfigError: No model, no dataset, or a LoRA beside the subnetwork.
    """
    if model_arguments.use_peft:
        _refuse(
            "--use_peft: expected one adapter, found LoRA beside the subnetwork; leave it out, "
            "or train LoRA with trl itself"
        )
    if not model_arguments.model_name_or_path:
        _refuse("--model_name_or_path: expected a model directory or hub id, found none")
    if not (script_arguments.dataset_name or dataset_arguments.datasets):
        _refuse("--dataset_name: expected a data file, directory or hub id, found none")


def _accept_file(script_arguments: Any, dataset_arguments: Any) -> None:
    """Have a data file as --dataset_name: `load_dataset` alone takes directories and hub ids.

    Raises:
        ConfigError: A file of another kind.
    """
    from trl.scripts.utils import DatasetConfig

    path = Path(script_arguments.dataset_name or "")
    if dataset_arguments.datasets or not path.is_file():
        return
    if path.suffix not in _FILES:
        _refuse(f"--dataset_name: expected one of {', '.join(_FILES)}, found {path}; convert it")
    dataset_arguments.datasets = [DatasetConfig(path=_FILES[path.suffix], data_files=str(path))]
    script_arguments.dataset_name = None


@contextmanager
def _trainers_take(name: str, config: Any) -> Iterator[None]:
    """Make ``trl.<name>`` a trainer of a subnetwork while the block runs.

    TRL's scripts pass the peft_config that their own LoRA options make, and take no other from
    outside. They look the trainer up in `trl` when they run: there it is given ours.
    """
    import trl

    from subnet_ft.meter import SubnetMeterCallback

    original = getattr(trl, name)

    def make(*args: Any, **kwargs: Any) -> Any:
        trainer = original(*args, **{**kwargs, "peft_config": config})
        if config.values_dtype == "bfloat16":
            trainer.optimizer_cls_and_kwargs = _residual_optimizer(trainer.args)
        trainer.callback_handler.callbacks.insert(0, SubnetMeterCallback())  # before trackers
        return trainer

    setattr(trl, name, make)
    try:
        yield
    finally:
        setattr(trl, name, original)


def _residual_optimizer(arguments: Any) -> tuple[type, dict[str, Any]]:
    """Name the one optimizer that steps bf16 values, with the Trainer's own numbers."""
    from subnet_ft.optim import SubnetAdamW

    return SubnetAdamW, {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "master": "residual",
    }
