"""The Lightning command line: ``fit``, ``predict`` and ``test`` of stages, from YAML and flags."""

import argparse
from collections.abc import Sequence
from typing import Any

import diffusers
import jsonargparse
import pytorch_lightning as pl
import transformers
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.errors import InvDiffError
from invdiff_pl.settings import EvaluationSettings, ExperimentSettings, ScaleSettings

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
    _call(InvDiffCLI, args)


def check(args: Sequence[str]) -> None:
    """Parse the arguments of a subcommand without running it.

    Raises:
        InvDiffError: if a key or a value is wrong.
    """
    _call(_CheckingCLI, args)


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
            parser_kwargs=dict.fromkeys(("fit", "predict", "test"), _OPTIONS) | _OPTIONS,
            args=list(args),
        )
    except argparse.ArgumentError as error:
        raise InvDiffError(_one_line(error)) from None


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
