"""What a data set of one's own gives, told and refused before the first stage runs."""

from collections.abc import Sequence

from invdiff_pl.cli.lightning import data_module, settings
from invdiff_pl.data.index import SPLITS
from invdiff_pl.data.samples import require_few_samples
from invdiff_pl.data.scarce import ONE_PROMPT
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.stages import Stage

_SAMPLING = ("samples", "backbone_samples")


def check_data(experiment: Experiment, stages: Sequence[Stage]) -> list[str]:
    """Read the data set's tables as the stages will, and count the samples to be drawn.

    Args:
        experiment: whose data set is given, not drawn.
        stages: that are to run.

    Returns:
        what was found, a line each.

    Raises:
        InvDiffError: if the data set cannot be used, or more samples would be drawn than the bound.
    """
    configs = [f"--config={path}" for path in experiment.files]
    data = data_module([*configs, *experiment.flags])
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
                    len(index.prompts), images["samples_per_prompt"], scales, model["max_samples"]
                )
            )
    return lines
