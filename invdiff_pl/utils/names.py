"""Names that settings choose by, known without torch, so that a wrong one is told at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from invdiff_pl.utils.errors import InvDiffError

ADAPTERS = ("bottleneck", "lora", "small_unet", "unet_copy")
OBJECTIVES = ("variance", "population_variance", "group_dro", "reweighting", "empirical_risk")
DENSITIES = ("uniform", "high_noise")
# Families that small pipelines are built of, see `invdiff_pl.backbones.new_pipeline`.
NEW_FAMILIES = ("sd", "sana")
BACKBONE_DENSITIES = ("power", "logit_normal")
WEIGHTINGS = ("none", "min_snr")
INFERENCES = ("mixture", "partition")
EXTRACTORS = ("dinov2", "efficientnet_lite0", "inception_v3")

# Settings of the package's own modules, by class.
OF_MODULES: dict[str, dict[str, Sequence[str]]] = {
    "invdiff_pl.modules.Backbone": {
        "timestep_density": BACKBONE_DENSITIES,
    },
    "invdiff_pl.modules.EnvironmentInference": {
        "inference": INFERENCES,
    },
    "invdiff_pl.modules.InvariantAdapter": {
        "adapter": ADAPTERS,
        "objective": OBJECTIVES,
        "timestep_density": DENSITIES,
        "loss_weighting": WEIGHTINGS,
    },
}


def require_name(argument: str, name: object, known: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Args:
        argument: or flag that it was given to, such as ``score`` or ``--model.score``.
        name: that was given.
        known: names that may be.

    Raises:
        InvDiffError: naming the argument, what was found and what was expected.
    """
    if name not in known:
        raise InvDiffError(f"{argument}={name}: expected one of {', '.join(known)}.", argument)


def require_names(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Refuse a stage's settings if one of them is a name that is not known.

    Args:
        config: of the stage, resolved: ``model`` (class path and arguments), ``evaluation``.
        overrides: the stage's own flags, which win; those not of the form ``--model.KEY=NAME`` are
            left to the parser.

    Raises:
        InvDiffError: naming the flag.
    """
    model = config.get("model") or {}
    given = {**(model.get("init_args") or {})}
    for override in overrides:
        flag, _, value = override.partition("=")
        given[flag.removeprefix("--model.").removeprefix("init_args.")] = value
    for setting, known in OF_MODULES.get(model.get("class_path", ""), {}).items():
        if setting in given:
            require_name(f"--model.{setting}", given[setting], known)
    extractor = (config.get("evaluation") or {}).get("extractor", EXTRACTORS[0])
    require_name("--evaluation.extractor", extractor, EXTRACTORS)
