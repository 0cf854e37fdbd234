"""The stages of an experiment: their commands, what they depend on, and whether they are current.

Knows nothing of torch, so that saying "up to date" takes no longer than reading a few files.
"""

import shutil
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from invdiff_pl.diffusion.assets import resolve_backbone
from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import digest_file, digest_folder, digest_json, remove_leftovers
from invdiff_pl.records import (
    FILES,
    RECORD,
    STARTED,
    find_problems,
    read_listing,
    read_record,
    remove_damaged,
    require_intact,
    write_listing,
    write_record,
)


@dataclass(frozen=True)
class Stage:
    """One step of an experiment, which writes the folder of its name in the run folder.

    Attributes:
        name: of the stage, its YAML file and its folder.
        command: subcommand of ``python -m invdiff_pl``.
        needs: stages whose output it reads.
        reads_backbone: whether it reads the experiment's backbone.
        explains: one line for the user.
        one_device: runs on one device whatever the others run on: batch normalisation would make
            its result depend on their number.
    """

    name: str
    command: str
    needs: tuple[str, ...]
    reads_backbone: bool
    explains: str
    one_device: bool = False


STAGES = {
    stage.name: stage
    for stage in (
        Stage("data", "render", (), False, "draw the stand-in pictures"),
        Stage("autoencoder", "fit", ("data",), False, "train a new backbone's autoencoder"),
        Stage("backbone", "fit", ("data", "autoencoder"), False, "train a new backbone"),
        Stage(
            "classifier",
            "fit",
            ("data",),
            False,
            "train the classifier that scores samples",
            one_device=True,
        ),
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
ONE_DEVICE = ("--trainer.devices=1", "--trainer.num_nodes=1")
# Holds what a stage had trained before its settings changed.
PREVIOUS = "previous"
_WHERE = ("devices", "num_nodes", "accelerator", "strategy", "plugins")
# Of the data: where rows are held and who reads them.
_HELD = ("residence", "workers")
_WATCHING = (
    "invdiff_pl.callbacks.Dashboard",
    "invdiff_pl.callbacks.EnvironmentSheets",
    "invdiff_pl.callbacks.FitEvaluation",
    "invdiff_pl.callbacks.LocalBatch",
    "invdiff_pl.callbacks.SampleGrid",
    "invdiff_pl.callbacks.StagePlan",
    "pytorch_lightning.callbacks.ModelCheckpoint",
)


@dataclass(frozen=True)
class Experiment:
    """An experiment's files and flags.

    Attributes:
        files: YAML files all stages read, in order.
        stage_folder: holds one YAML file a stage.
        flags: ``--experiment.…`` and other settings that all stages get.
        devices: flags that tell on how many devices stages run.
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
    devices: tuple[str, ...] = ()

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
            devices = ONE_DEVICE if stage.one_device and self.devices else self.devices
            overrides = self.overrides.get(stage.name, ())
            return [stage.command, *configs, *self.flags, *devices, *overrides]
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
        # A path that is not there is told when it is read.
        states = tuple((p, p.stat().st_mtime_ns if p.exists() else 0) for p in files)
        return deepcopy(_resolved(states, self.flags))

    @property
    def settings(self) -> dict[str, Any]:
        """What is shared by all stages."""
        return self.config()

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.settings["experiment"]["run_dir"])

    def folder(self, stage: Stage) -> Path:
        """Where the stage's output lies."""
        return self.run_dir / stage.name


@lru_cache(maxsize=64)
def _resolved(states: tuple[tuple[Path, int], ...], flags: tuple[str, ...]) -> dict[str, Any]:
    """Files and flags merged, once for as long as no file is written to; not to be changed."""
    merged = DictConfig({})
    for path, _ in states:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.load(path))  # type: ignore[assignment]
        except FileNotFoundError:
            raise InvDiffError(f"there is no file {path}.") from None
        except Exception as error:
            reason = str(error).replace("\n", " ")
            raise InvDiffError(f"{path} is not readable YAML: {reason}") from None
    dotlist = [flag.removeprefix("--") for flag in flags]
    try:
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(dotlist))  # type: ignore[assignment]
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InvDiffError(f"the settings cannot be resolved: {reason}") from None
    assert isinstance(resolved, dict)
    config = {str(key): value for key, value in resolved.items()}
    _require_form(config, states[-1][0])
    return config


def _require_form(config: dict[str, Any], last: Path) -> None:
    """Refuse settings that are not of the form that stages are told apart by.

    Raises:
        InvDiffError: naming the key.
    """
    for group in ("experiment", "scale", "evaluation", "trainer", "model", "data"):
        if not isinstance(config.get(group, {}), dict):
            raise InvDiffError(f"{last} and the files before it: {group} is no group of settings.")
    for key in ("name", "run_dir", "data_root", "backbone", "start"):
        if not isinstance(config.get("experiment", {}).get(key), str):
            raise InvDiffError(f"{last} and the files before it: experiment.{key} is no text.")
    if "seed_everything" not in config:
        raise InvDiffError(f"{last} and the files before it: seed_everything is missing.")
    callbacks = config.get("trainer", {}).get("callbacks", [])
    if not isinstance(callbacks, list) or not all(
        isinstance(entry, dict) and "class_path" in entry for entry in callbacks
    ):
        raise InvDiffError(
            f"{last} and the files before it: trainer.callbacks is no list of entries with a "
            "class_path."
        )


def fingerprint(experiment: Experiment, stage: Stage) -> str:
    """Digest of everything a stage's output depends on: settings, flags and inputs."""
    config = experiment.config(stage)
    shared = config.pop("experiment")
    for group in ("scale", "evaluation"):
        config.pop(group, None)  # their values count where a stage interpolates them
    if stage.command not in LIGHTNING:
        config = {"seed_everything": config["seed_everything"]} if stage.name == "report" else {}
    _drop_what_only_watches(config.get("trainer", {}))
    for name in _HELD:
        config.get("data", {}).get("init_args", {}).pop(name, None)
    key: dict[str, Any] = {
        "config": config,
        "overrides": experiment.overrides.get(stage.name, ()),
        "experiment": shared["name"],
        **inputs(experiment, stage),
    }
    return digest_json(key)


def inputs(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Digests of what a stage reads: the stages it needs and the backbone."""
    found: dict[str, Any] = {
        "needs": {name: _input_digest(experiment, STAGES[name]) for name in stage.needs}
    }
    if stage.name == "report":
        run_dir = Path(experiment.settings["experiment"]["run_dir"])
        extra = run_dir / "augmentation" / "augmentation.json"
        found["augmentation"] = digest_file(extra) if extra.is_file() else None
    if stage.reads_backbone:
        found["backbone"] = _pipeline_digest(experiment.settings["experiment"]["backbone"])
    return found


def _pipeline_digest(backbone: str) -> str:
    folder = Path(resolve_backbone(backbone))
    return digest_folder(folder) if folder.is_dir() else backbone


def _drop_what_only_watches(trainer: dict[str, Any]) -> None:
    """Take out what changes neither weights nor samples: where it runs and who looks on."""
    for name in (*_WHERE, "logger", "default_root_dir"):
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
    """Whether the stage's output is complete and what it depends on is unchanged.

    Raises:
        InvDiffError: if the stage's record is damaged or was changed by hand.
    """
    folder = experiment.folder(stage)
    record = read_record(folder / RECORD)
    if record is None or record["fingerprint"] != fingerprint(experiment, stage):
        return False
    listing = read_listing(folder, record)
    return listing is None or not any(find_problems(folder, listing, contents=False))


def begin(experiment: Experiment, stage: Stage) -> bool:
    """Make the stage's folder ready; an interrupted start with the same settings is kept.

    So is a finished stage of which files are missing or cut: it is taken up where they are. What
    was trained with other settings is put aside in ``RUN/previous``.

    Returns:
        whether there is such an interrupted start to go on from.

    Raises:
        InvDiffError: if a record is damaged, or the output of a stage that is needed was altered.
    """
    for name in stage.needs:
        require_intact(experiment.folder(STAGES[name]))
    folder = experiment.folder(stage)
    current = fingerprint(experiment, stage)
    record = read_record(folder / RECORD)
    if record is not None and record["fingerprint"] == current:
        problems = remove_damaged(folder, read_listing(folder, record) or {})
        names = ", ".join(f"{problem.file} ({problem.what})" for problem in problems[:3])
        print(f"      incomplete: {len(problems)} files, such as {names}", flush=True)
        write_record(folder / STARTED, {"fingerprint": current})
        (folder / RECORD).unlink()
    started = read_record(folder / STARTED)
    if started is not None and started["fingerprint"] == current:
        remove_leftovers(folder)
        return True
    _clear(folder, keep=stage.command == "fit")
    write_record(folder / STARTED, {"fingerprint": current})
    return False


def _clear(folder: Path, *, keep: bool) -> None:
    """Empty a stage's folder; records go first, lest half a folder be taken for a whole one."""
    if not folder.exists():
        return
    for name in (RECORD, STARTED, FILES):
        (folder / name).unlink(missing_ok=True)
    if keep and any(path.is_file() for path in folder.rglob("*")):
        previous = folder.parent / PREVIOUS / folder.name
        previous.parent.mkdir(exist_ok=True)
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        print(f"      what it had trained before is kept in {previous}", flush=True)
    else:
        shutil.rmtree(folder)


def finish(experiment: Experiment, stage: Stage, facts: dict[str, Any]) -> None:
    """Record that the stage's output is complete, and how it came about."""
    folder = experiment.folder(stage)
    remove_leftovers(folder)
    record = {
        "stage": stage.name,
        "fingerprint": fingerprint(experiment, stage),
        "config": experiment.config(stage),
        "overrides": list(experiment.overrides.get(stage.name, ())),
        "inputs": inputs(experiment, stage),
        "files": write_listing(folder),
        **facts,
    }
    write_record(folder / RECORD, record)
    (folder / STARTED).unlink(missing_ok=True)
