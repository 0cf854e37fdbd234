"""The package as `pip install` gives it: built from a source archive, run in another folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from invdiff_pl.utils.files import read_json

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("invdiff_pl", "experiments", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TINY = [
    "--render.fraction=0.02",
    "--scale.classifier_steps=2",
    "--scale.adapter_steps=2",
    "--scale.adapter_batch=12",
    "--scale.calibration_samples=0",
    "--scale.sampling_steps=2",
    "--scale.samples_per_prompt=2",
    "--model.train_without_bias=true",
]


def _build(kind: str, source: Path, into: Path) -> Path:
    """A ``wheel`` or an ``sdist`` of a source folder, without a download."""
    script = f"import sys; from setuptools.build_meta import *; build_{kind}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", script, str(into)], cwd=source, check=True, capture_output=True
    )
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from an unpacked source archive."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / "source" / name, ignore=ignored)
        else:
            shutil.copyfile(path, folder / "source" / name)
    for name in ("sdist", "unpacked", "wheel"):
        (folder / name).mkdir()
    with tarfile.open(_build("sdist", folder / "source", folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return _build("wheel", unpacked, folder / "wheel")


def test_a_wheel_holds_the_package_its_backbones_and_the_experiments(wheel: Path) -> None:
    def files(folder: str) -> set[str]:
        found = (REPOSITORY / folder).rglob("*")
        return {
            path.relative_to(REPOSITORY).as_posix()
            for path in found
            if path.is_file() and "__pycache__" not in path.parts
        }

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    experiments = {f"invdiff_pl/{name}" for name in files("experiments")}
    assert names == files("invdiff_pl") | experiments


@pytest.mark.slow
def test_installed_from_the_wheel_it_runs_an_experiment_in_any_folder(
    wheel: Path, tmp_path: Path
) -> None:
    installed, work = tmp_path / "installed", tmp_path / "work"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(installed), str(wheel)], check=True)
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(installed / "bin" / "invdiff"), "train"]
    words = ["--experiment", "waterbirds", *TINY]
    subprocess.run([*command, *words], cwd=work, env=environment, check=True)
    run_dir = work / "runs" / "waterbirds" / "mini"
    assert read_json(run_dir / "report" / "report.json")["experiment"] == "waterbirds"
    told = read_json(run_dir / "adapter" / "stage.json")["command"]
    assert f"--config={installed / 'invdiff_pl' / 'experiments' / 'waterbirds.yaml'}" in told
    assert (run_dir / "experiments" / "stages" / "adapter.yaml").is_file()
    assert (work / ".cache" / "invdiff").is_dir()
    again = subprocess.run(
        [*command, *words], cwd=work, env=environment, check=True, capture_output=True, text=True
    )
    assert again.stdout.count("up to date") == 6
