"""Names allowed in settings, listed without torch, so that a wrong one is reported at once."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
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
# How to hold weights that are not trained, see `invdiff_pl.backbones.pipeline.load_pipeline`.
FROZEN_WEIGHTS = ("float32", "bfloat16", "float16", "int8", "nf4")
OPTIMIZERS = ("adamw", "adamw8bit")
# Names that need an optional library.
_LIBRARIES = dict.fromkeys(("int8", "nf4", "adamw8bit"), "bitsandbytes")

# Settings of all stages, in the group `scale`.
OF_SCALE: dict[str, Sequence[str]] = {"frozen_weights": FROZEN_WEIGHTS, "optimizer": OPTIMIZERS}

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
    """Refuse a name that is not known, or that needs a library which is not installed.

    Args:
        argument: argument or flag that the name was given to, such as ``score`` or
            ``--model.score``.
        name: the given name.
        known: allowed names.

    Raises:
        InvDiffError: naming the argument, what was found and what was expected.
    """
    if name not in known:
        raise InvDiffError(f"{argument}={name}: expected one of {', '.join(known)}.", argument)
    library = _LIBRARIES.get(str(name))
    if library is not None and find_spec(library) is None:
        raise InvDiffError(
            f"{argument}={name}: {library} is not installed: `pip install {library}`, or choose "
            f"one of {', '.join(each for each in known if each not in _LIBRARIES)}.",
            argument,
        )


def require_names(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Refuse a stage's settings if one of them is a name that is not known.

    Args:
        config: the stage's resolved settings: ``model`` (class path and arguments), ``scale``,
            ``evaluation``.
        overrides: the stage's own flags, which win; those not of the form ``--model.KEY=NAME`` are
            left to the parser.

    Raises:
        InvDiffError: naming the flag.
    """
    scale = config.get("scale") or {}
    for setting, known in OF_SCALE.items():
        if setting in scale:
            require_name(f"--scale.{setting}", scale[setting], known)
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
