"""The shipped YAML files: a value lives once, and scales extend what they have in common."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.workflow.experiment import PACKAGED, find_file, scale_files
from invdiff_pl.workflow.settings import ScaleSettings

FILES = sorted([*PACKAGED.glob("stages/*.yaml"), *PACKAGED.glob("scales/**/*.yaml")])
LARGE = ("flux", "flux2", "lumina2", "pixart", "sana", "sd3", "sdxl", "zimage")


def _defaults(chosen: type) -> dict[str, Any]:
    """Of a constructor's arguments, and of those that it hands on."""
    return {
        name: argument.default
        for each in reversed(chosen.__mro__)
        if "__init__" in vars(each)
        for name, argument in inspect.signature(each).parameters.items()
        if argument.default is not argument.empty
    }


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _built(settings: dict[str, Any]) -> Iterator[tuple[type, dict[str, Any]]]:
    """Everything that a file has built, with the arguments that it gives."""
    trainer = dict(settings.get("trainer") or {})
    entries = [settings.get("model") or {}, *trainer.pop("callbacks", ())]
    for entry in entries:
        if "class_path" in entry:
            yield _class(entry["class_path"]), entry.get("init_args") or {}
    yield pl.Trainer, trainer
    yield BiasedDataModule, (settings.get("data") or {}).get("init_args") or {}
    yield ScaleSettings, settings.get("scale") or {}
    yield EvaluationSettings, settings.get("evaluation") or {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGED).as_posix())
def test_no_key_repeats_its_constructors_default(file: Path) -> None:
    repeated = [
        f"{built.__name__}.{name}"
        for built, arguments in _built(yaml.safe_load(file.read_text(encoding="utf-8")))
        for name, value in arguments.items()
        if name in (defaults := _defaults(built))
        and value == (list(d) if isinstance(d := defaults[name], tuple) else d)
    ]
    assert repeated == []


@pytest.mark.parametrize("scale", LARGE)
def test_a_large_family_repeats_nothing_that_all_have_in_common(scale: str) -> None:
    shared, own = (
        yaml.safe_load(find_file(name, PACKAGED).read_text(encoding="utf-8"))
        for name in scale_files(scale, PACKAGED)
    )
    assert own["experiment"] == {"scale": scale, "extends": "shared/large"}
    assert not set(own["scale"]) & set(shared["scale"])
    assert set(own) == {"experiment", "scale"}


def test_what_a_scale_extends_may_be_the_users_own_and_must_be_there(tmp_path) -> None:
    scales = tmp_path / "scales"
    scales.mkdir()
    (scales / "mine.yaml").write_text("experiment:\n  extends: common\n")
    with pytest.raises(InvDiffError, match=r"mine\.yaml: there is no scales/common\.yaml"):
        scale_files("mine", tmp_path)
    (scales / "common.yaml").write_text("scale:\n  resolution: 64\n")
    assert scale_files("mine", tmp_path) == ["scales/common.yaml", "scales/mine.yaml"]
    assert scale_files("mini", tmp_path) == ["scales/mini.yaml"]
