"""The stages of an experiment: their commands, what they depend on, and whether they are current.

Knows nothing of torch, so that saying "up to date" takes no longer than reading a few files.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from invdiff_pl.diffusion.assets import resolve_backbone
from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import digest_file, digest_folder, digest_json, read_json, write_json

RECORD = "stage.json"
STARTED = "started.json"


@dataclass(frozen=True)
class Stage:
    """One step of an experiment, which writes the folder of its name in the run folder.

    Attributes:
        name: of the stage, its YAML file and its folder.
        command: subcommand of ``python -m invdiff_pl``.
        needs: stages whose output it reads.
        reads_backbone: whether it reads the experiment's backbone.
        explains: one line for the user.
    """

    name: str
    command: str
    needs: tuple[str, ...]
    reads_backbone: bool
    explains: str


STAGES = {
    stage.name: stage
    for stage in (
        Stage("data", "render", (), False, "draw the stand-in pictures"),
        Stage("autoencoder", "fit", ("data",), False, "train a new backbone's autoencoder"),
        Stage("backbone", "fit", ("data", "autoencoder"), False, "train a new backbone"),
        Stage("classifier", "fit", ("data",), False, "train the classifier that scores samples"),
        Stage(
            "backbone_samples",
            "predict",
            ("data", "classifier", "backbone"),
            False,
            "sample the new backbone and measure its bias",
        ),
        Stage("card", "card", ("backbone_samples",), False, "write the new backbone's model card"),
        Stage("environments", "predict", ("data",), True, "infer environments without labels"),
        Stage("adapter", "fit", ("data", "environments"), True, "train the invariant adapter"),
        Stage(
            "samples",
            "predict",
            ("data", "classifier", "adapter"),
            True,
            "sample before and after, and measure",
        ),
        Stage(
            "augmentation",
            "fit",
            ("data", "samples"),
            False,
            "train a classifier with debiased samples, and look at its worst group",
        ),
        Stage("report", "report", ("environments", "samples"), False, "tables and pictures"),
    )
}
PLANS = {
    "train": ("data", "classifier", "environments", "adapter", "samples", "report"),
    "augment": (
        *("data", "classifier", "environments", "adapter", "samples"),
        *("augmentation", "report"),
    ),
    "backbone": ("data", "autoencoder", "backbone", "classifier", "backbone_samples", "card"),
}
# Flags without a stage's name go to the stage that a command is about.
MAIN_STAGE = {"train": "adapter", "augment": "adapter", "backbone": "backbone"}
LIGHTNING = ("fit", "predict")
_WATCHING = (
    "invdiff_pl.callbacks.Dashboard",
    "invdiff_pl.callbacks.FitEvaluation",
    "invdiff_pl.callbacks.SampleGrid",
    "pytorch_lightning.callbacks.ModelCheckpoint",
)


@dataclass(frozen=True)
class Experiment:
    """An experiment's files and flags.

    Attributes:
        files: YAML files all stages read, in order.
        stage_folder: holds one YAML file a stage.
        flags: ``--experiment.…`` and other settings that all stages get.
        overrides: further flags by stage.
        rendered: whether the data set is drawn, not given.
        fine_tunes: whether a new backbone starts from a given pipeline, not from an autoencoder
            of its own.
    """

    files: tuple[Path, ...]
    stage_folder: Path
    flags: tuple[str, ...]
    overrides: dict[str, tuple[str, ...]]
    rendered: bool
    fine_tunes: bool = False

    def plan(self, command: str) -> list[Stage]:
        """The stages of a command, in order, less those whose output is given."""
        given = {"data": not self.rendered, "autoencoder": self.fine_tunes}
        return [STAGES[name] for name in PLANS[command] if not given.get(name, False)]

    def stage_files(self, stage: Stage) -> list[Path]:
        """The YAML files of a stage, in order; later ones win."""
        return [*self.files, self.stage_folder / f"{stage.name}.yaml"]

    def arguments(self, stage: Stage) -> list[str]:
        """The stage's command line after ``python -m invdiff_pl``."""
        if stage.command in LIGHTNING:
            configs = [f"--config={path}" for path in self.stage_files(stage)]
            return [stage.command, *configs, *self.flags, *self.overrides.get(stage.name, ())]
        run_dir = self.settings["experiment"]["run_dir"]
        name = self.settings["experiment"]["name"]
        extra = ["--experiment", name] if stage.command == "render" else []
        seed = (
            ["--seed", str(self.settings["seed_everything"])] if stage.command == "report" else []
        )
        overrides = self.overrides.get(stage.name, ())
        return [stage.command, "--run-dir", run_dir, *extra, *seed, *overrides]

    def config(self, stage: Stage | None = None) -> dict[str, Any]:
        """The YAML files and flags as one resolved mapping.

        Raises:
            InvDiffError: if a file is missing or no YAML, or an interpolation has no value.
        """
        files = list(self.files)
        if stage is not None and stage.command in LIGHTNING:
            files = self.stage_files(stage)
        merged = DictConfig({})
        for path in files:
            try:
                merged = OmegaConf.merge(merged, OmegaConf.load(path))  # type: ignore[assignment]
            except FileNotFoundError:
                raise InvDiffError(f"there is no file {path}.") from None
            except Exception as error:
                reason = str(error).replace("\n", " ")
                raise InvDiffError(f"{path} is not readable YAML: {reason}") from None
        flags = [flag.removeprefix("--") for flag in self.flags]
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(flags))  # type: ignore[assignment]
            resolved = OmegaConf.to_container(merged, resolve=True)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise InvDiffError(f"the settings cannot be resolved: {reason}") from None
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What is shared by all stages."""
        return self.config()

    def folder(self, stage: Stage) -> Path:
        """Where the stage's output lies."""
        return Path(self.settings["experiment"]["run_dir"]) / stage.name


def fingerprint(experiment: Experiment, stage: Stage) -> str:
    """Digest of everything a stage's output depends on: settings, flags and inputs."""
    config = experiment.config(stage)
    shared = config.pop("experiment")
    for group in ("scale", "evaluation"):
        config.pop(group, None)  # their values count where a stage interpolates them
    if stage.command not in LIGHTNING:
        config = {"seed_everything": config["seed_everything"]} if stage.name == "report" else {}
    _drop_what_only_watches(config.get("trainer", {}))
    key: dict[str, Any] = {
        "config": config,
        "overrides": experiment.overrides.get(stage.name, ()),
        "needs": {name: _input_digest(experiment, STAGES[name]) for name in stage.needs},
        "experiment": shared["name"],
    }
    if stage.name == "report":
        extra = Path(shared["run_dir"]) / "augmentation" / "augmentation.json"
        key["augmentation"] = digest_file(extra) if extra.is_file() else None
    if stage.reads_backbone:
        key["backbone"] = _pipeline_digest(shared["backbone"])
    return digest_json(key)


def _pipeline_digest(backbone: str) -> str:
    folder = Path(resolve_backbone(backbone))
    return digest_folder(folder) if folder.is_dir() else backbone


def _drop_what_only_watches(trainer: dict[str, Any]) -> None:
    """Take out what changes neither weights nor samples: where it runs and who looks on."""
    for name in ("logger", "default_root_dir", "devices", "num_nodes", "accelerator"):
        trainer.pop(name, None)
    callbacks = trainer.get("callbacks", [])
    trainer["callbacks"] = [c for c in callbacks if c["class_path"] not in _WATCHING]


def _input_digest(experiment: Experiment, stage: Stage) -> str:
    if stage.name == "data" and not experiment.rendered:
        return _listing_digest(Path(experiment.settings["experiment"]["data_root"]))
    if stage.name == "autoencoder" and experiment.fine_tunes:
        return _pipeline_digest(experiment.settings["experiment"]["start"])
    return fingerprint(experiment, stage)


def _listing_digest(root: Path) -> str:
    if not root.is_dir():
        raise InvDiffError(
            f"data folder {root} does not exist: give the data set's folder with DATA=."
        )
    files = sorted(path for path in root.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(root)), path.stat()) for path in files]
    return digest_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def is_current(experiment: Experiment, stage: Stage) -> bool:
    """Whether the stage's output is complete and what it depends on is unchanged."""
    record = experiment.folder(stage) / RECORD
    return record.is_file() and read_json(record)["fingerprint"] == fingerprint(experiment, stage)


def begin(experiment: Experiment, stage: Stage) -> bool:
    """Make the stage's folder ready; an interrupted start with the same settings is kept.

    Returns:
        whether there is such an interrupted start to go on from.
    """
    folder = experiment.folder(stage)
    started = folder / STARTED
    current = fingerprint(experiment, stage)
    if started.is_file() and json.loads(started.read_text())["fingerprint"] == current:
        return True
    if folder.exists():
        shutil.rmtree(folder)
    write_json(started, {"fingerprint": current})
    return False


def finish(experiment: Experiment, stage: Stage, facts: dict[str, Any]) -> None:
    """Record that the stage's output is complete, and how it came about."""
    folder = experiment.folder(stage)
    record = {
        "stage": stage.name,
        "fingerprint": fingerprint(experiment, stage),
        "config": experiment.config(stage),
        "overrides": experiment.overrides.get(stage.name, ()),
        **facts,
    }
    write_json(folder / RECORD, record)
    (folder / STARTED).unlink(missing_ok=True)
