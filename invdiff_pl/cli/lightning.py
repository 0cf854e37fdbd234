"""The Lightning command line: ``fit``, ``predict`` and ``test`` of stages, from YAML and flags."""

import argparse
import functools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors import SafetensorError

from invdiff_pl.callbacks import StopOnDivergence, StopOnSigterm
from invdiff_pl.callbacks.progress import progress_callback
from invdiff_pl.cli.account import one_line
from invdiff_pl.cli.flags import data_flags, stage_flags
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.locks import run_lock
from invdiff_pl.utils.processes import LOCKED, Terminated, hide_idle_slurm, raising_on_sigterm
from invdiff_pl.utils.tensors import system_error
from invdiff_pl.workflow.checkpoints import SafeCheckpointIO
from invdiff_pl.workflow.settings import ExperimentSettings, ScaleSettings

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


class _BuildingError(BaseException):
    """Carries what a constructor raised past jsonargparse.

    It takes every ``Exception`` for a sign that a value is of another type, tries them all, and
    raises an account of the types in its place.
    """


class _Parser(LightningArgumentParser):
    """Lightning's parser; what a constructor raises leaves it unchanged (:func:`_told`)."""

    def add_instantiator(self, instantiator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Register a way to build a class."""

        @functools.wraps(instantiator)
        def build(class_type: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return instantiator(class_type, *args, **kwargs)
            except Exception as error:
                raise _BuildingError(class_type) from error

        super().add_instantiator(build, *args, **kwargs)


class InvDiffCLI(LightningCLI):
    """Model and data are chosen by class path; shared settings are groups of their own.

    Interpolations such as ``${experiment.run_dir}`` are resolved last, so that they follow every
    later file and flag.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups that stage files interpolate."""
        for group, settings in _GROUPS.items():
            parser.add_argument(f"--{group}", type=settings, default=settings())

    def _add_instantiators(self) -> None:
        """Let callbacks and all else be built as model and data are: errors come out unchanged."""
        super()._add_instantiators()
        self.parser.add_instantiator(_construct, object)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer."""
        with self._naming_flags():
            super().instantiate_classes()

    @contextmanager
    def _naming_flags(self) -> Iterator[None]:
        """Tell errors in the words of the command line: flags for arguments."""
        try:
            try:
                yield
            except _BuildingError as error:
                raise _told(error) from None
        except InvDiffError as error:
            config = self.config[self.subcommand].as_dict()
            raise error.in_flags(stage_flags(config)) from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; its checkpoints are written and read safely."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except Exception as error:
            raise _BuildingError(pl.Trainer) from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for place, callback in enumerate(callbacks):
            if type(callback) is RichProgressBar:  # Lightning's default
                callbacks[place] = progress_callback()
        return trainer

    def _set_seed(self) -> None:
        """Seed everything; refuse what is no seed."""
        try:
            super()._set_seed()
        except ValueError:
            seed = self.config[self.subcommand]["seed_everything"]
            raise InvDiffError(
                f"--seed_everything={seed}: expected a whole number from 0 to 2^32 - 1."
            ) from None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it, as the only one that writes to the run folder."""
        with self._lock(subcommand), self._naming_flags():
            super()._run_subcommand(subcommand)

    def _lock(self, subcommand: str) -> AbstractContextManager[object]:
        if os.environ.get(LOCKED) or _get_rank():  # `train` or the first rank has it
            return nullcontext()
        run_dir = Path(self.config[subcommand]["experiment"]["run_dir"])
        return run_lock(run_dir, f"python -m invdiff_pl {subcommand} …")

    def _parse_ckpt_path(self) -> None:
        """Keep files' and flags' settings; Lightning would let a checkpoint's override them."""


def _construct(class_type: type, *args: Any, **kwargs: Any) -> Any:
    return class_type(*args, **kwargs)


def _construct_own(class_type: type, *args: Any, **kwargs: Any) -> Any:
    """Build what is ours, which reads no file; others' loggers may start an experiment."""
    return class_type(*args, **kwargs) if class_type.__module__.startswith("invdiff_pl.") else None


def _require_settings(class_type: type, **settings: Any) -> None:
    """Let a module refuse settings, without the networks that building it would load."""
    if (require := getattr(class_type, "require_settings", None)) is not None:
        require(settings)


class _BuildingCLI(InvDiffCLI):
    """Parses and builds model, data and trainer, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class _ParsingCLI(_BuildingCLI):
    """Parses and stops there."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


class _CheckingCLI(_BuildingCLI):
    """Parses, and asks every class that is ours whether it takes its settings."""

    def _add_instantiators(self) -> None:
        self.parser.add_instantiator(_require_settings, pl.LightningModule)
        self.parser.add_instantiator(_construct, BiasedDataModule)
        self.parser.add_instantiator(_construct_own, object)

    def instantiate_classes(self) -> None:
        """Build data and callbacks, which only keep their settings, and no network."""
        with self._naming_flags():
            self.parser.instantiate_classes(self.config)


def run_lightning(command: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of ``fit``, ``predict`` or ``test``, and run it.

    Raises:
        InvDiffError: if a key or a value is wrong, or the stage's input is.
    """
    hide_idle_slurm(_devices(arguments))
    # Under SLURM Lightning saves on another signal and asks to be queued again.
    handling = nullcontext() if SLURMEnvironment.detect() else raising_on_sigterm()
    try:
        with handling:
            _call(InvDiffCLI, [command, *arguments])
    except SIGTERMException:  # Lightning's has exit status 0, as if all were done
        raise Terminated from None
    except MisconfigurationException as error:  # what Lightning refuses once it starts
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
    """How many devices of this machine the arguments ask for; all that there are by default."""
    asked = [arg.partition("=")[2] for arg in args if arg.startswith("--trainer.devices=")]
    return int(asked[-1]) if asked and asked[-1].isdigit() else torch.cuda.device_count()


def check(args: Sequence[str]) -> None:
    """Parse the arguments of a subcommand and refuse settings as the stage itself would.

    No file but YAML is read, and no network built.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    _call(_CheckingCLI, args)


def settings(args: Sequence[str]) -> dict[str, Any]:
    """The resolved settings of a subcommand's arguments, without running it.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    resolved: dict[str, Any] = _call(_ParsingCLI, args).config[args[0]].as_dict()
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
    parser = _Parser(**_OPTIONS)
    parser.add_instantiator(_construct, object)
    parser.add_argument("--config", action="config")
    for group, settings in _GROUPS.items():
        parser.add_argument(f"--{group}", type=settings, default=settings())
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_argument("--trainer", type=dict)  # files tell of one; it is not built
    parser.add_subclass_arguments(BiasedDataModule, "data", required=True)
    try:
        config = parser.parse_args(list(args))
    except argparse.ArgumentError as error:
        raise InvDiffError(one_line(str(error))) from None
    except OmegaConfBaseException as error:
        raise InvDiffError(_unresolved(error)) from None
    try:
        data = parser.instantiate_classes(config).data
    except _BuildingError as error:
        told = _told(error)
        if isinstance(told, InvDiffError):
            told = told.in_flags(data_flags(*error.args))
        raise told from None
    assert isinstance(data, BiasedDataModule)
    return data


def _call(cli: type[InvDiffCLI], args: Sequence[str]) -> InvDiffCLI:
    command = args[0]
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Parsers of other subcommands, which nobody asks, take as long to build as this one's.
    only = {command: LightningCLI.subcommands()[command]}
    cli = type(cli.__name__, (cli,), {"subcommands": staticmethod(lambda: only)})
    try:
        return cli(
            pl.LightningModule,
            BiasedDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [StopOnDivergence(), StopOnSigterm()]},
            parser_class=_Parser,
            parser_kwargs={command: _OPTIONS, **_OPTIONS},
            args=list(args),
        )
    except argparse.ArgumentError as error:
        raise InvDiffError(one_line(str(error))) from None
    except OmegaConfBaseException as error:
        raise InvDiffError(_unresolved(error)) from None


def _unresolved(error: OmegaConfBaseException) -> str:
    """Which setting refers to one that is not there."""
    key = f"{error.full_key}: " if error.full_key else ""
    return f"{key}{str(error).splitlines()[0]}: ${{…}} stands for another setting."


def _told(failure: _BuildingError) -> Exception:
    """What a constructor raised, as an error that is told in one line."""
    error = failure.__cause__
    # The others are told by whoever runs the command.
    if isinstance(error, InvDiffError | OSError | SafetensorError | torch.OutOfMemoryError):
        return error
    assert isinstance(error, Exception)
    (class_type,) = failure.args
    *_, last = traceback.extract_tb(error.__traceback__)
    return InvDiffError(
        f"{class_type.__name__} cannot be built ({type(error).__name__}: {error}; "
        f"{Path(last.filename).name}, line {last.lineno})."
    )
