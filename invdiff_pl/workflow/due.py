"""Which stages are due, and what is done before and after one runs.

This module does not import torch, so that saying "up to date" takes no longer than reading a few
files.
"""

import shutil
from pathlib import Path
from typing import Any

from invdiff_pl.backbones.assets import backbone_digest
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import (
    digest_file,
    digest_json,
    is_file,
    is_folder,
    remove_leftovers,
    walk,
)
from invdiff_pl.workflow.causes import flags_that_count, settings_that_count, source_digest
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.records import (
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
from invdiff_pl.workflow.stages import LIGHTNING, Stage

# Folder of what a stage had trained before its settings changed.
PREVIOUS = "previous"


def fingerprint(experiment: Experiment, stage: Stage) -> str:
    """Compute the digest of all that a stage's output depends on: settings, inputs and source."""
    config = experiment.config(stage)
    shared = config.pop("experiment")
    for group in ("scale", "evaluation"):
        config.pop(group, None)  # their values count where a stage interpolates them
    if stage.command not in LIGHTNING:
        config = {"seed_everything": config["seed_everything"]} if stage.name == "report" else {}
    key: dict[str, Any] = {
        "config": settings_that_count(config, stage),
        "overrides": flags_that_count(experiment.overrides.get(stage.name, ()), stage),
        "experiment": shared["name"],
        **inputs(experiment, stage),
    }
    return digest_json(key)


def inputs(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Compute digests of a stage's source and inputs: the stages it needs and the backbone."""
    config = experiment.config(stage)
    own = [config.get(part, {}).get("class_path") for part in ("model", "data")]
    found: dict[str, Any] = {
        "needs": {name: _input_digest(experiment, experiment.stage(name)) for name in stage.needs},
        "source": source_digest(stage, [path for path in own if path]),
    }
    if stage.name == "report":
        run_dir = Path(experiment.settings["experiment"]["run_dir"])
        extra = run_dir / "augmentation" / "augmentation.json"
        found["augmentation"] = digest_file(extra) if extra.is_file() else None
    if stage.reads_backbone:
        found["backbone"] = backbone_digest(experiment.settings["experiment"]["backbone"])
    return found


def _input_digest(experiment: Experiment, stage: Stage) -> str:
    if stage.name == "data" and not experiment.rendered:
        return _data_digest(experiment.settings)
    if stage.name == "autoencoder" and experiment.fine_tunes:
        return backbone_digest(experiment.settings["experiment"]["start"])
    return fingerprint(experiment, stage)


def _data_digest(config: dict[str, Any]) -> str:
    """Compute the digest of the data folder's listing, and of files elsewhere named in settings."""
    root = Path(config["experiment"]["data_root"])
    data = config.get("data", {})
    chosen = {**data.get("init_args", {}), **data}
    listing = _listing_digest(root, follow_links=chosen.get("links") == "follow")
    given = [chosen.get(key) for key in ("table", "prompt_map")]
    named = [Path(each) for each in given if isinstance(each, str) and each]
    elsewhere = [digest_file(path) for path in named if is_file(path)]
    return digest_json([listing, *elsewhere]) if elsewhere else listing


def _listing_digest(root: Path, *, follow_links: bool) -> str:
    if not is_folder(root):
        raise InvDiffError(
            f"data folder {root} does not exist: give the data set's folder with DATA=."
        )
    walked = walk(root, follow_links=follow_links)
    files = sorted(p for at, _, names in walked for name in names if (p := at / name).is_file())
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
    """Prepare the stage's folder; an interrupted start with the same settings is kept.

    So is a finished stage with missing or truncated files, which is resumed to write them again.
    What was trained with other settings is put aside in ``RUN/previous``.

    Returns:
        whether there is such an interrupted start to resume.

    Raises:
        InvDiffError: if a record is damaged, or the output of a stage that is needed was altered.
    """
    for name in stage.needs:
        require_intact(experiment.folder(experiment.stage(name)))
    folder = experiment.folder(stage)
    current, found = fingerprint(experiment, stage), inputs(experiment, stage)
    record = read_record(folder / RECORD)
    if record is not None and record["fingerprint"] == current:
        problems = remove_damaged(folder, read_listing(folder, record) or {})
        names = ", ".join(f"{problem.file} ({problem.what})" for problem in problems[:3])
        print(f"      incomplete: {len(problems)} files, such as {names}", flush=True)
        write_record(folder / STARTED, {"fingerprint": current, "inputs": found})
        (folder / RECORD).unlink()
    started = read_record(folder / STARTED)
    if started is not None and started["fingerprint"] == current:
        remove_leftovers(folder)
        return True
    made = (record or started or {}).get("inputs")
    if made is not None and made.get("source") != found["source"]:
        print("      was made with another version of the code", flush=True)
    _clear(folder, keep=stage.command == "fit")
    write_record(folder / STARTED, {"fingerprint": current, "inputs": found})
    return False


def _clear(folder: Path, *, keep: bool) -> None:
    """Empty a stage's folder, records first, so that half a folder is not taken for a whole one."""
    if not folder.exists():
        return
    for name in (RECORD, STARTED, FILES):
        (folder / name).unlink(missing_ok=True)
    if keep and any(path.is_file() for path in folder.rglob("*")):
        previous = folder.parent / PREVIOUS / folder.name
        previous.parent.mkdir(exist_ok=True)
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        print(f"      what was trained before is kept in {previous}", flush=True)
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
