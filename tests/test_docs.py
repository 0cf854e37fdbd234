"""The documented names: a page each, every argument told, an example that runs."""

import importlib
import importlib.util
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from docstring_parser import parse

import invdiff_pl as inv
from invdiff_pl.data.synthetic.waterbirds import RenderedWaterbirds, plan_pictures

DOCS = Path(__file__).parents[1] / "docs"
NAMES = [name for name in inv.__all__ if name in inv._HOMES]
# What a user calls; the others are made by these, and raised.
CALLED = [name for name in NAMES if name not in ("Audit", "Discovery", "InvDiffError")]


def _listed() -> list[str]:
    """The names that have a page, with their modules."""
    names, module = [], ""
    for line in (DOCS / "api" / "index.rst").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\.\. currentmodule:: (\S+)", line):
            module = match[1]
        elif match := re.fullmatch(r"   ([A-Za-z_.]+)", line):
            names.append(f"{module}.{match[1]}")
    return names


def _of(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_public_name_has_a_page() -> None:
    assert {f"invdiff_pl.{name}" for name in NAMES} <= set(_listed())


@pytest.mark.parametrize("name", _listed())
def test_a_page_tells_every_argument(name: str) -> None:
    documented = _of(name)
    told = parse(documented.__doc__ or "")
    assert told.short_description
    if inspect.isclass(documented) and "__init__" not in vars(documented):
        return
    expected = set(inspect.signature(documented).parameters) - {"args", "kwargs"}
    assert expected <= {word.lstrip("*") for p in told.params for word in p.arg_name.split(", ")}


@pytest.mark.parametrize("name", CALLED)
def test_what_a_user_calls_has_an_example_that_runs(name: str) -> None:
    assert ">>> " in (getattr(inv, name).__doc__ or "")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra docs")
def test_the_pages_are_built_without_a_warning(tmp_path) -> None:
    words = ["-m", "sphinx", "-W", "-q", "-d", str(tmp_path / "trees"), str(DOCS / "api")]
    subprocess.run([sys.executable, *words, str(tmp_path / "html")], check=True)
    for name in _listed():
        page = tmp_path / "html" / "generated" / f"{name}.html"
        assert name.rpartition(".")[2] in page.read_text(encoding="utf-8")


class _Dataset:
    """The accessors of ``datasets.Dataset`` that are used, where that package is not installed."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    from_dict = classmethod(lambda cls, columns: cls(columns))

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, which: int | str) -> Any:
        if isinstance(which, str):
            return self.columns[which]
        return {name: values[which] for name, values in self.columns.items()}

    def add_column(self, name: str, values: list[Any]) -> "_Dataset":
        return _Dataset({**self.columns, name: values})


def _run(
    script: str, monkeypatch: pytest.MonkeyPatch, folder: Path, steps: int = 2
) -> dict[str, Any]:
    sizes = {"FRACTION": "0.012", "STEPS": str(steps), "STARTS": "2", "TMPDIR": str(folder)}
    for name, value in sizes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(sys, "argv", [script])
    return runpy.run_path(str(DOCS / "examples" / script), run_name="__main__")


def test_the_script_on_ones_own_pipeline_and_folder_draws_before_and_after(
    monkeypatch, tmp_path, capsys
) -> None:
    names = _run("own_pipeline_and_folder.py", monkeypatch, tmp_path)
    assert names["before"].shape == names["after"].shape == (4, 3, 32, 32)
    assert not names["before"].equal(names["after"])
    assert "stock diffusers draws the same: True" in capsys.readouterr().out
    pictures = {path.name for path in names["work"].glob("*.png")}
    assert {"sheet.png", "before-0.png", "after-3.png"} <= pictures


def test_the_script_on_a_hugging_face_data_set_groups_its_rows(
    monkeypatch, tmp_path, capsys
) -> None:
    if importlib.util.find_spec("datasets") is None:
        module = ModuleType("datasets")
        module.Dataset = _Dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
    names = _run("hugging_face_dataset.py", monkeypatch, tmp_path)
    planned = plan_pictures(RenderedWaterbirds(fraction=0.012))
    assert len(names["dataset"]) == sum(picture.split == 0 for picture in planned)
    assert names["dataset"].column_names == ["image", "caption", "group", "conflict"]
    assert "% on water" in capsys.readouterr().out


def test_the_script_on_a_hugging_face_data_set_says_what_to_install(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        _run("hugging_face_dataset.py", monkeypatch, tmp_path)


def test_the_script_with_a_stock_trainer_leaves_two_adapters(monkeypatch, tmp_path) -> None:
    names = _run("stock_trainer.py", monkeypatch, tmp_path, steps=1)
    for folder in ("own-loader", "in-memory"):
        assert inv.TrainedAdapter(names["work"] / folder / "adapter").trained
    assert (names["work"] / "picture.png").is_file()
