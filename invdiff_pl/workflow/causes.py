"""What a stage's result depends on: which of its settings and flags, and which source files.

This module does not import torch. A callback counts if its class says ``changes_result = True``;
all others only watch, as loggers do.
"""

import ast
import importlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

import invdiff_pl
from invdiff_pl.utils.files import digest_file, digest_json
from invdiff_pl.workflow.stages import Stage

PACKAGE = Path(invdiff_pl.__file__).parent
_DECLARATION = "changes_result"
# Of the trainer: where it runs, and what is reported of it.
_WATCHING = (
    *("devices", "num_nodes", "accelerator", "strategy", "plugins"),
    *("logger", "log_every_n_steps", "profiler", "default_root_dir"),
    *("enable_progress_bar", "enable_model_summary", "enable_checkpointing"),
)
# Of Lightning's own callbacks, which declare nothing, those that change what is trained.
_LIGHTNING = (
    *("BackboneFinetuning", "BatchSizeFinder", "EarlyStopping", "EMAWeightAveraging"),
    *("GradientAccumulationScheduler", "LearningRateFinder", "ModelPruning"),
    *("StochasticWeightAveraging", "Timer", "WeightAveraging"),
)
# Of the data: where rows are held, and by which processes they are read.
_HELD = ("latent_device", "workers")
# Of the model: how much is done at once, and what memory that takes.
_UNCOUNTED_MODEL = ("gradient_checkpointing", "batch_size")


def settings_that_count(config: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Remove from a stage's resolved settings what changes neither weights nor samples.

    That is: where it runs, where rows are held, how much is done at once, and who watches.

    Args:
        config: the settings, changed in place.
        stage: the stage that they belong to.
    """
    trainer = config.get("trainer", {})
    for name in _WATCHING:
        trainer.pop(name, None)
    if "callbacks" in trainer:
        trainer["callbacks"] = _changing(trainer["callbacks"])
    data = config.get("data", {}).get("init_args", {})
    for name in _uncounted_data(stage):
        data.pop(name, None)
    for name in _UNCOUNTED_MODEL:
        config.get("model", {}).get("init_args", {}).pop(name, None)
    return config


def flags_that_count(flags: Iterable[str], stage: Stage) -> list[str]:
    """Do the same for a stage's own flags, ``--trainer.…``, ``--model.…`` and ``--data.…``.

    Args:
        flags: flags as ``--key=value``, in order.
        stage: the stage that they are given to.
    """
    kept = []
    last_counts = True  # of the callbacks that flags have added
    for flag in flags:
        key, _, value = flag.removeprefix("--").partition("=")
        group, name, *deeper = [*key.replace(".init_args", "").split("."), ""]
        if group == "trainer" and name.rstrip("+") == "callbacks":
            if deeper == [""]:
                given = _changing(_entries(value))
                last_counts = bool(given)
                # Callbacks that replace those of the files undo what those changed.
                if last_counts or not name.endswith("+"):
                    kept.append(f"--{key}={digest_json(given)}")
            elif last_counts:
                kept.append(flag)
        elif not (
            (group == "trainer" and name in _WATCHING)
            or (group == "model" and name in _UNCOUNTED_MODEL)
            or (group == "data" and name in _uncounted_data(stage))
        ):
            kept.append(flag)
    return kept


def _uncounted_data(stage: Stage) -> tuple[str, ...]:
    return (*_HELD, "batch_size") if stage.command == "predict" else _HELD


def _entries(value: str) -> list[Any]:
    """Parse the callbacks of a flag: a class path, an entry, or a list of either."""
    try:
        given = yaml.safe_load(value)
    except yaml.YAMLError:
        given = value
    return given if isinstance(given, list) else [given]


def _changing(callbacks: Any) -> list[dict[str, Any]]:
    """Return the callbacks that change the result, less how much they do at once."""
    found = []
    for entry in callbacks if isinstance(callbacks, list) else []:
        told: dict[str, Any] = entry if isinstance(entry, dict) else {"class_path": str(entry)}
        if changes_result(str(told.get("class_path"))):
            arguments = told.get("init_args") or {}
            if isinstance(arguments, dict):  # the stage refuses anything else
                arguments = {name: arguments[name] for name in arguments if name != "batch_size"}
            found.append({**told, "init_args": arguments})
    return found


def changes_result(class_path: str) -> bool:
    """Whether a callback changes what a stage writes, according to its class.

    Args:
        class_path: path such as ``invdiff_pl.callbacks.SampleGrid``; a user's own class is
            imported.
    """
    module, _, name = class_path.rpartition(".")
    if module.split(".")[0] in ("", "invdiff_pl", "pytorch_lightning", "lightning"):
        return name in _LIGHTNING or name in _declared(PACKAGE)
    try:
        own = getattr(importlib.import_module(module), name)
    except Exception:  # whatever is wrong with it is reported when the stage runs
        return False
    return bool(getattr(own, _DECLARATION, False))


def source_digest(stage: Stage, class_paths: Iterable[str] = ()) -> str:
    """Compute the digest of the source that a stage's result depends on.

    That is the package's source in the rooms that the stage uses, less callbacks that watch, and
    the files of a user's own classes. It is the same wherever the same version is installed.

    Args:
        stage: the stage, which names the rooms.
        class_paths: class paths of the model and the data.
    """
    own = []
    for path in class_paths:
        module = path.rpartition(".")[0]
        try:
            found = find_spec(module) if module.split(".")[0] != PACKAGE.name else None
        except (ImportError, ValueError):
            found = None
        if found is not None and found.origin and Path(found.origin).is_file():
            own.append((path, digest_file(Path(found.origin))))
    return digest_json([_digest(PACKAGE, stage.code), own])


@lru_cache(maxsize=64)
def _digest(package: Path, code: Sequence[str]) -> str:
    watching = set((package / "callbacks").glob("*.py")) - set(_declared(package).values())
    files = set()
    for room in code:
        files |= {package / room} if room.endswith(".py") else set((package / room).rglob("*.py"))
    return digest_json(
        [
            (file.relative_to(package).as_posix(), digest_file(file))
            for file in sorted(files - watching)
        ]
    )


@lru_cache(maxsize=8)
def _declared(package: Path) -> dict[str, Path]:
    """Return the package's callbacks that change the result, and where each is defined."""
    return {
        node.name: file
        for file in (package / "callbacks").glob("*.py")
        if _DECLARATION in (text := file.read_text(encoding="utf-8"))
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
        and any(_DECLARATION in ast.unparse(line) for line in node.body)
    }
