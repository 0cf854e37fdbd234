"""The LightningCLI that runs, builds, parses and checks stages."""

import functools
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_fabric.utilities.rank_zero import _get_rank
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from safetensors import SafetensorError

from invdiff_pl.callbacks.progress import progress_callback
from invdiff_pl.cli.flags import stage_flags
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.locks import run_lock
from invdiff_pl.utils.processes import LOCKED
from invdiff_pl.workflow.checkpoints import SafeCheckpointIO
from invdiff_pl.workflow.settings import ExperimentSettings, ScaleSettings

OPTIONS: dict[str, Any] = {
    "parser_mode": "omegaconf+",
    "exit_on_error": False,
    "allow_abbrev": False,
}
GROUPS: dict[str, type] = {
    "experiment": ExperimentSettings,
    "scale": ScaleSettings,
    "evaluation": EvaluationSettings,
}


class BuildingError(BaseException):
    """Carries what a constructor raised past jsonargparse.

    jsonargparse takes every ``Exception`` as a sign that a value is of another type, tries all
    types, and raises an account of them instead.
    """


class StageParser(LightningArgumentParser):
    """Lightning's parser, which lets errors of constructors through unchanged (:func:`told`)."""

    def add_instantiator(self, instantiator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Register a way to build a class."""

        @functools.wraps(instantiator)
        def build(class_type: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return instantiator(class_type, *args, **kwargs)
            except Exception as error:
                raise BuildingError(class_type) from error

        super().add_instantiator(build, *args, **kwargs)


class InvDiffCLI(LightningCLI):
    """A LightningCLI with model and data chosen by class path, and groups of shared settings.

    Interpolations such as ``${experiment.run_dir}`` are resolved last, so that they follow every
    later file and flag.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups that stage files interpolate."""
        for group, settings in GROUPS.items():
            parser.add_argument(f"--{group}", type=settings, default=settings())

    def _add_instantiators(self) -> None:
        """Build callbacks and all else as model and data, so that errors come out unchanged."""
        super()._add_instantiators()
        self.parser.add_instantiator(construct, object)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer."""
        with self._naming_flags():
            super().instantiate_classes()

    @contextmanager
    def _naming_flags(self) -> Iterator[None]:
        """Report errors in terms of the command line, with flags in place of arguments."""
        try:
            try:
                yield
            except BuildingError as error:
                raise told(error) from None
        except InvDiffError as error:
            config = self.config[self.subcommand].as_dict()
            raise error.in_flags(stage_flags(config)) from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer, which writes and reads checkpoints safely."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except Exception as error:
            raise BuildingError(pl.Trainer) from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for place, callback in enumerate(callbacks):
            if type(callback) is RichProgressBar:  # Lightning's default
                callbacks[place] = progress_callback()
        return trainer

    def _set_seed(self) -> None:
        """Seed everything; refuse what is not a valid seed."""
        try:
            super()._set_seed()
        except ValueError:
            seed = self.config[self.subcommand]["seed_everything"]
            raise InvDiffError(
                f"--seed_everything={seed}: expected a whole number from 0 to 2^32 - 1."
            ) from None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand as the only process that writes to the run folder."""
        with self._lock(subcommand), self._naming_flags():
            super()._run_subcommand(subcommand)

    def _lock(self, subcommand: str) -> AbstractContextManager[object]:
        if os.environ.get(LOCKED) or _get_rank():  # `train` or the first rank has it
            return nullcontext()
        run_dir = Path(self.config[subcommand]["experiment"]["run_dir"])
        return run_lock(run_dir, f"python -m invdiff_pl {subcommand} …")

    def _parse_ckpt_path(self) -> None:
        """Keep the settings of files and flags, which Lightning lets a checkpoint's override."""


def construct(class_type: type, *args: Any, **kwargs: Any) -> Any:
    """Build a class as jsonargparse itself does."""
    return class_type(*args, **kwargs)


def _construct_own(class_type: type, *args: Any, **kwargs: Any) -> Any:
    """Build this package's classes, which read no file; others' loggers may start an experiment."""
    return class_type(*args, **kwargs) if class_type.__module__.startswith("invdiff_pl.") else None


def _require_settings(class_type: type, **settings: Any) -> None:
    """Let a module refuse settings without loading the networks that building it would."""
    if (require := getattr(class_type, "require_settings", None)) is not None:
        require(settings)


class BuildingCLI(InvDiffCLI):
    """A CLI that parses and builds model, data and trainer, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class ParsingCLI(BuildingCLI):
    """A CLI that parses, and stops there."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


class CheckingCLI(BuildingCLI):
    """A CLI that parses, and checks the settings of all classes of this package."""

    def _add_instantiators(self) -> None:
        self.parser.add_instantiator(_require_settings, pl.LightningModule)
        self.parser.add_instantiator(construct, BiasedDataModule)
        self.parser.add_instantiator(_construct_own, object)

    def instantiate_classes(self) -> None:
        """Build data and callbacks, which only keep their settings, and no network."""
        with self._naming_flags():
            self.parser.instantiate_classes(self.config)


def told(failure: BuildingError) -> Exception:
    """Return what a constructor raised as an error that fits in one line."""
    error = failure.__cause__
    # Whoever runs the command handles these.
    if isinstance(error, InvDiffError | OSError | SafetensorError | torch.OutOfMemoryError):
        return error
    assert isinstance(error, Exception)
    (class_type,) = failure.args
    *_, last = traceback.extract_tb(error.__traceback__)
    return InvDiffError(
        f"{class_type.__name__} cannot be built ({type(error).__name__}: {error}; "
        f"{Path(last.filename).name}, line {last.lineno})."
    )
