"""Checks before the first stage runs: names, flags, backbone and data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from invdiff_pl.backbones.check import check_backbone
from invdiff_pl.utils.errors import InvDiffError, in_flags
from invdiff_pl.utils.names import require_names
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.stages import LIGHTNING, Stage

if TYPE_CHECKING:
    from invdiff_pl.data.base import BiasedDataModule

_SAMPLING = ("samples", "backbone_samples")


def check_backbones(command: str, experiment: Experiment, due: Sequence[Stage]) -> None:
    """Refuse, before the first stage runs, a backbone that no stage could use."""
    settings = experiment.settings["experiment"]
    if any(stage.reads_backbone for stage in due):
        check_backbone(settings["backbone"])
    elif command == "backbone" and experiment.fine_tunes:
        check_backbone(settings["start"])


def check_arguments(experiment: Experiment, due: Sequence[Stage], overridden: bool) -> None:
    """Check every due stage's arguments, so that a wrong one is reported before any stage runs.

    Args:
        experiment: experiment that the stages belong to.
        due: stages that are to run.
        overridden: whether there are flags beside the YAML files, as their keys may be mistyped.

    Raises:
        InvDiffError: naming the stage and what is wrong.
    """
    stages = [stage for stage in due if stage.command in LIGHTNING]
    for stage in stages:
        with _told_of(stage):
            require_names(experiment.config(stage), experiment.overrides.get(stage.name, ()))
    if not (stages and overridden):
        return
    from invdiff_pl.cli.lightning import check  # noqa: PLC0415 - takes seconds

    for stage in stages:
        with _told_of(stage):
            check(experiment.arguments(stage))


def check_data(experiment: Experiment, stages: Sequence[Stage]) -> list[str]:
    """Read the data set's tables as the stages will, and count the samples to be drawn.

    Args:
        experiment: experiment whose data set is given, not drawn.
        stages: stages that are to run.

    Returns:
        lines that say what was found.

    Raises:
        InvDiffError: if the data set cannot be used, or more samples than allowed would be drawn.
    """
    # Importing torch and Lightning takes seconds, which runs on drawn data can do without here.
    from invdiff_pl.cli.flags import data_flags  # noqa: PLC0415
    from invdiff_pl.cli.lightning import data_module  # noqa: PLC0415

    configs = [f"--config={path}" for path in experiment.files]
    data = data_module([*configs, *experiment.flags])
    flags = data_flags(type(data))
    try:
        lines = _look_over(data, experiment, stages)
    except InvDiffError as error:
        raise error.in_flags(flags) from None
    return [in_flags(line, flags) for line in lines]


def _look_over(
    data: "BiasedDataModule", experiment: Experiment, stages: Sequence[Stage]
) -> list[str]:
    from invdiff_pl.cli.lightning import settings  # noqa: PLC0415
    from invdiff_pl.data.index import SPLITS  # noqa: PLC0415
    from invdiff_pl.data.samples import require_few_samples  # noqa: PLC0415
    from invdiff_pl.data.scarce import ONE_PROMPT  # noqa: PLC0415

    index = data.index
    sizes = ", ".join(
        f"{count} {split}"
        for split, count in zip(SPLITS, index.splits.bincount(minlength=3).tolist(), strict=True)
    )
    lines = [*data.told, f"{len(index)} images of {len(index.prompts)} prompts: {sizes}"]
    if len(index.prompts) == 1 and any(stage.name == "environments" for stage in stages):
        lines.append(ONE_PROMPT)
    for stage in stages:
        if stage.name in _SAMPLING:
            chosen = settings(experiment.arguments(stage))
            model, images = chosen["model"]["init_args"], chosen["data"]["init_args"]
            scales = 1 if model.get("adapter") is None else len(model["invariant_scales"])
            lines.append(
                require_few_samples(
                    len(index.prompts),
                    images["samples_per_prompt"],
                    scales,
                    chosen["scale"]["max_samples"],
                )
            )
    return lines


@contextmanager
def _told_of(stage: Stage) -> Iterator[None]:
    try:
        yield
    except InvDiffError as error:
        raise InvDiffError(f"stage {stage.name}: {error}") from None
