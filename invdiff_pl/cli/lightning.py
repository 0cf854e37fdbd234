"""The Lightning command line: ``fit``, ``predict`` and ``test`` of stages, from YAML and flags."""

import argparse
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import jsonargparse
import pytorch_lightning as pl
import torch
import transformers
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_fabric.utilities.rank_zero import _get_rank
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import SIGTERMException
from safetensors import SafetensorError

from invdiff_pl.callbacks import ProgressBar, StopOnDivergence, StopOnSigterm
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.locks import run_lock
from invdiff_pl.utils.processes import LOCKED, Terminated, raising_on_sigterm
from invdiff_pl.utils.tensors import system_error
from invdiff_pl.workflow.checkpoints import SafeCheckpointIO
from invdiff_pl.workflow.settings import EvaluationSettings, ExperimentSettings, ScaleSettings

_OPTIONS: dict[str, Any] = {
    "parser_mode": "omegaconf+",
    "exit_on_error": False,
    "allow_abbrev": False,
}
_GROUPS: dict[str, type] = {
    "experiment": ExperimentSettings,
    "scale": ScaleSettings,
    "evaluation": EvaluationSettings,
}


class InvDiffCLI(LightningCLI):
    """Model and data are chosen by class path; shared settings are groups of their own.

    Interpolations such as ``${experiment.run_dir}`` are resolved last, so that they follow every
    later file and flag.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups that stage files interpolate."""
        for group, settings in _GROUPS.items():
            parser.add_argument(f"--{group}", type=settings, default=settings())

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; its checkpoints are written and read safely."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for place, callback in enumerate(callbacks):
            if type(callback) is RichProgressBar:  # Lightning's default
                callbacks[place] = ProgressBar()
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it, as the only one that writes to the run folder."""
        with self._lock(subcommand):
            super()._run_subcommand(subcommand)

    def _lock(self, subcommand: str) -> AbstractContextManager[object]:
        if os.environ.get(LOCKED) or _get_rank():  # `train` or the first rank has it
            return nullcontext()
        run_dir = Path(self.config[subcommand]["experiment"]["run_dir"])
        return run_lock(run_dir, f"python -m invdiff_pl {subcommand} …")

    def _parse_ckpt_path(self) -> None:
        """Keep files' and flags' settings; Lightning would let a checkpoint's override them."""


class _CheckingCLI(InvDiffCLI):
    """Parses and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


class _BuildingCLI(InvDiffCLI):
    """Parses and builds model, data and trainer, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def run(args: Sequence[str]) -> None:
    """Parse the arguments and run the subcommand they name.

    Raises:
        InvDiffError: if a key or a value is wrong, or the stage's input is.
    """
    # Under SLURM Lightning saves on another signal and asks to be queued again.
    handling = nullcontext() if SLURMEnvironment.detect() else raising_on_sigterm()
    try:
        with handling:
            _call(InvDiffCLI, args)
    except SIGTERMException:  # Lightning's has exit status 0, as if all were done
        raise Terminated from None
    except SafetensorError as error:  # from libraries that write such files
        raise system_error(error) from None
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise InvDiffError(
            f"the device's memory is full ({reason}): lower --scale.local_batch (training), "
            "--scale.scoring_batch or --scale.sampling_batch, or set "
            "--scale.gradient_checkpointing=true; finished steps and files are kept."
        ) from None


def check(args: Sequence[str]) -> None:
    """Parse the arguments of a subcommand without running it.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    _call(_CheckingCLI, args)


def settings(args: Sequence[str]) -> dict[str, Any]:
    """The resolved settings of a subcommand's arguments, without running it.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    resolved: dict[str, Any] = _call(_CheckingCLI, args).config[args[0]].as_dict()
    return resolved


def build(args: Sequence[str]) -> InvDiffCLI:
    """Model, data and trainer of a subcommand's arguments, not yet run.

    Raises:
        InvDiffError: if a key or a value is wrong, or the stage's input is.
    """
    return _call(_BuildingCLI, args)


def data_module(args: Sequence[str]) -> BiasedDataModule:
    """The DataModule that YAML files and flags describe, without a model or a trainer.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = LightningArgumentParser(**_OPTIONS)
    parser.add_argument("--config", action="config")
    for group, settings in _GROUPS.items():
        parser.add_argument(f"--{group}", type=settings, default=settings())
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_argument("--trainer", type=dict)  # files tell of one; it is not built
    parser.add_subclass_arguments(BiasedDataModule, "data", required=True)
    try:
        config = parser.parse_args(list(args))
    except argparse.ArgumentError as error:
        raise InvDiffError(_one_line(error)) from None
    except OmegaConfBaseException as error:
        raise InvDiffError(_unresolved(error)) from None
    data = parser.instantiate_classes(config).data
    assert isinstance(data, BiasedDataModule)
    return data


def _call(cli: type[InvDiffCLI], args: Sequence[str]) -> InvDiffCLI:
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        return cli(
            pl.LightningModule,
            BiasedDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [StopOnDivergence(), StopOnSigterm()]},
            parser_kwargs=dict.fromkeys(("fit", "predict", "test"), _OPTIONS) | _OPTIONS,
            args=list(args),
        )
    except argparse.ArgumentError as error:
        raise InvDiffError(_one_line(error)) from None
    except OmegaConfBaseException as error:
        raise InvDiffError(_unresolved(error)) from None


def _unresolved(error: OmegaConfBaseException) -> str:
    """Which setting refers to one that is not there."""
    key = f"{error.full_key}: " if error.full_key else ""
    return f"{key}{str(error).splitlines()[0]}: ${{…}} stands for another setting."


def _one_line(error: argparse.ArgumentError) -> str:
    """What is wrong, without the parser's account of the types it tried."""
    lines = str(error).splitlines()
    problems = [n for n, line in enumerate(lines) if "Problem with given class_path" in line]
    if not problems:
        return " ".join(line.strip() for line in lines[:2])
    first = problems[0]
    depth = len(lines[first]) - len(lines[first].lstrip())
    told = [lines[0].strip(" :"), lines[first].split("class_path ")[1].strip(":")]
    for line in lines[first + 1 :]:
        if len(line) - len(line.lstrip()) <= depth:
            break
        told.append(line.strip(" :"))
    return ": ".join(told)
