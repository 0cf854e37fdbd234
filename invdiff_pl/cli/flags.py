"""The command line's flags for the arguments that the library's errors name."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invdiff_pl.utils.processes import LOCKED

# Arguments that come from shared settings: those of callbacks, and others that several stages take.
_OF_CALLBACKS = {
    "compiled": "--scale.compile_denoiser",
    "size": "--scale.max_micro_batch",
    "samples": "--scale.calibration_samples",
}
_SHARED = {
    "max_samples": "--scale.max_samples",
    "samples_per_prompt": "--scale.samples_per_prompt",
}


def stage_flags(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a stage's flags by argument, for the groups of settings, the DataModule and the model.

    The flags of a stage that ``train`` runs have the form that ``train`` takes,
    ``--STAGE.model.…``.

    Args:
        config: the stage's parsed settings: ``model``, ``data``, ``trainer`` and the groups.
    """
    trainer = config["trainer"]
    stage = f"{Path(trainer['default_root_dir']).name}." if _run_by_train(trainer) else ""
    flags = {"trainer": f"--{stage}trainer"}
    for group in ("experiment", "scale", "evaluation"):
        flags |= {name: f"--{group}.{name}" for name in config[group]}
    callbacks = {name for each in trainer["callbacks"] or () for name in _names(each)}
    flags |= {name: flag for name, flag in _OF_CALLBACKS.items() if name in callbacks}
    for group, prefix in (("data", ""), ("model", stage)):
        flags |= {name: f"--{prefix}{group}.{name}" for name in _names(config[group])}
    return flags | _SHARED


def data_flags(data_module: type) -> dict[str, str]:
    """Return a DataModule's flags by argument, with others that its messages name."""
    names = {
        name
        for each in data_module.__mro__
        if "__init__" in vars(each)
        for name in inspect.signature(each).parameters
    }
    flags = {name: f"--data.{name}" for name in names}
    return flags | {"train_without_bias": "--model.train_without_bias", **_SHARED}


def _run_by_train(trainer: Mapping[str, Any]) -> bool:
    return LOCKED in os.environ and trainer["default_root_dir"] is not None


def _names(chosen: object) -> list[str]:
    """Return the arguments of a class given by its path; an object has none."""
    return list((chosen.get("init_args") or {}) if isinstance(chosen, Mapping) else ())
