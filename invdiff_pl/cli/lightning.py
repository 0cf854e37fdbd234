"""The Lightning command line: running ``fit``, ``predict`` or ``test`` from YAML and flags."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import jsonargparse
import pytorch_lightning as pl
import torch
import transformers
from lightning_fabric.plugins.environments import SLURMEnvironment
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors import SafetensorError

from invdiff_pl.callbacks import StopOnDivergence, StopOnSigterm
from invdiff_pl.cli.account import one_line
from invdiff_pl.cli.flags import data_flags
from invdiff_pl.cli.stage_cli import (
    GROUPS,
    OPTIONS,
    BuildingCLI,
    BuildingError,
    CheckingCLI,
    InvDiffCLI,
    ParsingCLI,
    StageParser,
    construct,
    told,
)
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.processes import Terminated, hide_idle_slurm, raising_on_sigterm
from invdiff_pl.utils.tensors import system_error


def run_lightning(command: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of ``fit``, ``predict`` or ``test``, and run the subcommand.

    Raises:
        InvDiffError: if a key, a value or the stage's input is wrong.
    """
    hide_idle_slurm(_devices(arguments))
    # Under SLURM Lightning saves on another signal and requeues the job.
    handling = nullcontext() if SLURMEnvironment.detect() else raising_on_sigterm()
    try:
        with handling:
            _call(InvDiffCLI, [command, *arguments])
    except SIGTERMException:  # its exit status is 0, as if all were done
        raise Terminated from None
    except MisconfigurationException as error:  # refused by Lightning at the start
        raise InvDiffError(str(error)) from None
    except SafetensorError as error:  # from libraries that write such files
        raise system_error(error) from None
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise InvDiffError(
            f"the device's memory is full ({reason}): lower --scale.max_micro_batch (training), "
            "--scale.scoring_batch or --scale.sampling_batch, or set "
            "--scale.gradient_checkpointing=true; finished steps and files are kept."
        ) from None


def _devices(args: Sequence[str]) -> int:
    """Return how many devices of this machine the arguments ask for; by default all."""
    asked = [arg.partition("=")[2] for arg in args if arg.startswith("--trainer.devices=")]
    return int(asked[-1]) if asked and asked[-1].isdigit() else torch.cuda.device_count()


def check(args: Sequence[str]) -> None:
    """Parse the arguments of a subcommand and refuse settings as the stage itself would.

    Only YAML files are read, and no network is built.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    _call(CheckingCLI, args)


def settings(args: Sequence[str]) -> dict[str, Any]:
    """Resolve the settings of a subcommand's arguments, without running it.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    resolved: dict[str, Any] = _call(ParsingCLI, args).config[args[0]].as_dict()
    return resolved


def build(args: Sequence[str]) -> InvDiffCLI:
    """Build model, data and trainer from a subcommand's arguments, without running it.

    Raises:
        InvDiffError: if a key, a value or the stage's input is wrong.
    """
    return _call(BuildingCLI, args)


def data_module(args: Sequence[str]) -> BiasedDataModule:
    """Build the DataModule that YAML files and flags describe, without a model or a trainer.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = StageParser(**OPTIONS)
    parser.add_instantiator(construct, object)
    parser.add_argument("--config", action="config")
    for group, settings in GROUPS.items():
        parser.add_argument(f"--{group}", type=settings, default=settings())
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_argument("--trainer", type=dict)  # files may have one; it is not built
    parser.add_subclass_arguments(BiasedDataModule, "data", required=True)
    with _in_one_line():
        config = parser.parse_args(list(args))
    try:
        data = parser.instantiate_classes(config).data
    except BuildingError as error:
        failure = told(error)
        if isinstance(failure, InvDiffError):
            failure = failure.in_flags(data_flags(*error.args))
        raise failure from None
    assert isinstance(data, BiasedDataModule)
    return data


def _call(cli: type[InvDiffCLI], args: Sequence[str]) -> InvDiffCLI:
    command = args[0]
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # The parsers of other subcommands, which are not needed, take as long to build as this one.
    only = {command: LightningCLI.subcommands()[command]}
    cli = type(cli.__name__, (cli,), {"subcommands": staticmethod(lambda: only)})
    with _in_one_line():
        return cli(
            pl.LightningModule,
            BiasedDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [StopOnDivergence(), StopOnSigterm()]},
            parser_class=StageParser,
            parser_kwargs={command: OPTIONS, **OPTIONS},
            args=list(args),
        )


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Report in one line a wrong key or value, or a reference to a setting that does not exist."""
    try:
        yield
    except argparse.ArgumentError as error:
        raise InvDiffError(one_line(str(error))) from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        told = f"{key}{str(error).splitlines()[0]}: ${{…}} refers to another setting."
        raise InvDiffError(told) from None
