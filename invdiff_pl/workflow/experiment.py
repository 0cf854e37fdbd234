"""An experiment's files and flags, as one resolved mapping and as each stage's command line."""

from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import invdiff_pl
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file
from invdiff_pl.workflow.settings import ScaleSettings
from invdiff_pl.workflow.stages import (
    GENERATED,
    LIGHTNING,
    ONE_DEVICE,
    PLANS,
    STAGES,
    Stage,
)

# The DataModule of images that the backbone draws itself.
GENERATED_DATA = "invdiff_pl.data.generated.GeneratedDataModule"
# Flags whose value is text, even if it looks like YAML, as a folder called "birds: 2024" does.
_TEXT = (
    *(f"experiment.{key}" for key in ("run_dir", "data_root", "backbone", "start", "cache_dir")),
    *(
        f"data.{key}"
        for key in ("prompt", "prompts", "prompt_map", "prompts_from", "prompt_template", "table")
    ),
    *(f"data.{key}_column" for key in ("file", "prompt", "split", "attribute")),
)
# The settings that come with the package; in a checkout they are beside it.
_PACKAGE = Path(invdiff_pl.__file__).parent
PACKAGED = _PACKAGE / "experiments"
if not PACKAGED.is_dir():
    PACKAGED = _PACKAGE.parent / "experiments"


def find_file(name: str, folder: Path) -> Path:
    """Find an experiment's YAML file: the one in a folder, or else the packaged one.

    Args:
        name: name such as ``waterbirds.yaml``, ``scales/mini.yaml`` or ``stages/adapter.yaml``.
        folder: folder of the user's own files.

    Returns:
        the file's path, in ``folder`` if it does not exist anywhere.
    """
    packaged = PACKAGED / name
    return packaged if is_file(packaged) and not is_file(folder / name) else folder / name


def find_names(pattern: str, folder: Path) -> list[str]:
    """List the names that :func:`find_file` finds, such as all of ``scales/*.yaml``."""
    places = (folder, PACKAGED)
    return sorted({str(p.relative_to(place)) for place in places for p in place.glob(pattern)})


def scale_files(scale: str, folder: Path) -> list[str]:
    """List the names of a scale's YAML files, in order: the one that it extends comes first.

    Args:
        scale: name of the scale, such as ``mini``.
        folder: folder of the user's own files.

    Raises:
        InvDiffError: if a file is not YAML, or the one that it extends is missing.
    """
    name = f"scales/{scale}.yaml"
    path = find_file(name, folder)
    group = _merged(DictConfig({}), path).get("experiment") if is_file(path) else None
    if not isinstance(group, DictConfig) or (extended := group.get("extends")) is None:
        return [name]
    if not is_file(find_file(f"scales/{extended}.yaml", folder)):
        raise InvDiffError(f"{path}: there is no scales/{extended}.yaml that it extends.")
    return [f"scales/{extended}.yaml", name]


@dataclass(frozen=True)
class Experiment:
    """An experiment's files and flags.

    Attributes:
        files: YAML files that all stages read, in order.
        experiments: folder where a stage's YAML file is looked up first, see :func:`find_file`.
        flags: ``--experiment.…`` and other settings that all stages get.
        devices: flags that set the number of devices on which stages run.
        overrides: further flags by stage.
        rendered: whether the data set is drawn rather than given.
        fine_tunes: whether a new backbone starts from a given pipeline rather than from its own
            autoencoder.
    """

    files: tuple[Path, ...]
    experiments: Path
    flags: tuple[str, ...]
    overrides: dict[str, tuple[str, ...]]
    rendered: bool
    fine_tunes: bool = False
    devices: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of :attr:`files` for :func:`find_file`."""
        places = self.experiments, PACKAGED
        found = [(path, next(p for p in places if path.is_relative_to(p))) for path in self.files]
        return [path.relative_to(place).as_posix() for path, place in found]

    def plan(self, command: str) -> list[Stage]:
        """Return the stages of a command, in order, less those whose output is given."""
        given = {"data": not self.rendered, "autoencoder": self.fine_tunes}
        return [self.stage(name) for name in PLANS[command] if not given.get(name, False)]

    def stage(self, name: str) -> Stage:
        """Return a stage by its name; the data stage may be the one that draws from prompts."""
        drawn = self.settings.get("data", {}).get("class_path") == GENERATED_DATA
        return GENERATED if name == "data" and drawn else STAGES[name]

    def stage_files(self, stage: Stage) -> list[Path]:
        """Return the YAML files of a stage, in order; later ones win."""
        return [*self.files, find_file(f"stages/{stage.name}.yaml", self.experiments)]

    def arguments(self, stage: Stage) -> list[str]:
        """Return the stage's command line after ``python -m invdiff_pl``."""
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
        """Return the YAML files and flags as one resolved mapping.

        Raises:
            InvDiffError: if a file is missing or not YAML, or an interpolation has no value.
        """
        files = list(self.files)
        if stage is not None and stage.command in LIGHTNING:
            files = self.stage_files(stage)
        # A missing path is reported when it is read.
        states = tuple((p, p.stat().st_mtime_ns if is_file(p) else 0) for p in files)
        return deepcopy(_resolved(states, self.flags))

    @property
    def settings(self) -> dict[str, Any]:
        """Settings shared by all stages."""
        return self.config()

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.settings["experiment"]["run_dir"])

    def folder(self, stage: Stage) -> Path:
        """Return the folder of the stage's output."""
        return self.run_dir / stage.name


@lru_cache(maxsize=64)
def _resolved(states: tuple[tuple[Path, int], ...], flags: tuple[str, ...]) -> dict[str, Any]:
    """Merge files and flags, once for as long as no file changes; callers must copy the result."""
    merged = DictConfig({"scale": asdict(ScaleSettings())})
    for path, _ in states:
        merged = _merged(merged, path)
    dotlist = [flag.removeprefix("--") for flag in flags]
    try:
        for flag in dotlist:
            if flag.endswith("={}"):
                # Merging an empty group would change nothing; the command line takes it as given.
                OmegaConf.update(merged, flag.removesuffix("={}"), {}, merge=False)
            else:
                merged = OmegaConf.merge(merged, _of_flag(flag))  # type: ignore[assignment]
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InvDiffError(f"the settings cannot be resolved: {reason}") from None
    assert isinstance(resolved, dict)
    config = {str(key): value for key, value in resolved.items()}
    _require_form(config, states[-1][0])
    return config


def _merged(settings: DictConfig, path: Path) -> DictConfig:
    """Merge settings with those of a file, which win."""
    try:
        return OmegaConf.merge(settings, OmegaConf.load(path))  # type: ignore[return-value]
    except FileNotFoundError:
        raise InvDiffError(f"there is no file {path}.") from None
    except Exception as error:
        reason = str(error).replace("\n", " ")
        raise InvDiffError(f"{path} is not readable YAML: {reason}") from None


def _of_flag(flag: str) -> DictConfig:
    """Convert a flag ``key=value`` to settings; text is taken as it is, all else as YAML."""
    key, _, value = flag.partition("=")
    if key not in _TEXT:
        return OmegaConf.from_dotlist([flag])
    settings = DictConfig({})
    OmegaConf.update(settings, key, value, force_add=True)
    return settings


def _require_form(config: dict[str, Any], last: Path) -> None:
    """Check that settings have the form on which the fingerprints of stages rely.

    Raises:
        InvDiffError: naming the key that is wrong.
    """
    where = f"{last} and the files before it"
    for group in ("experiment", "scale", "evaluation", "trainer", "model", "data"):
        if not isinstance(config.get(group, {}), dict):
            raise InvDiffError(f"{where}: {group} is not a group of settings.")
    for key in ("name", "run_dir", "data_root", "backbone", "start"):
        if not isinstance(config.get("experiment", {}).get(key), str):
            raise InvDiffError(f"{where}: experiment.{key} is not text.")
    for part in ("model", "data"):
        if not isinstance(config.get(part, {}).get("init_args", {}), dict):
            raise InvDiffError(f"{where}: {part}.init_args is not a group of settings.")
        if not isinstance(config.get(part, {}).get("class_path", ""), str):
            raise InvDiffError(f"{where}: {part}.class_path is not text.")
    if "seed_everything" not in config:
        raise InvDiffError(f"{where}: seed_everything is missing.")
    callbacks = config.get("trainer", {}).get("callbacks", [])
    if not isinstance(callbacks, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("class_path"), str) for entry in callbacks
    ):
        raise InvDiffError(
            f"{where}: trainer.callbacks is not a list of entries with a class_path."
        )
