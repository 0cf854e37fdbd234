"""The names that are known without torch are those of the registries."""

import subprocess
import sys

import pytest

from invdiff_pl.adapters.base import _REGISTRY
from invdiff_pl.metrics.extractors import _BUILDERS
from invdiff_pl.objectives.rules import RULES
from invdiff_pl.utils import names
from invdiff_pl.utils.errors import InvDiffError


def test_they_are_those_of_the_registries() -> None:
    assert set(names.OBJECTIVES) == set(RULES)
    assert set(names.ADAPTERS) == set(_REGISTRY)
    assert set(names.EXTRACTORS) == set(_BUILDERS)


def test_they_need_no_torch() -> None:
    code = "import sys, invdiff_pl.workflow.run as run; print(run, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("False")


def _config(**arguments: object) -> dict:
    return {
        "model": {
            "class_path": "invdiff_pl.modules.EnvironmentInference",
            "init_args": {"inference": "mixture", **arguments},
        }
    }


def test_a_name_in_a_file_and_one_in_a_flag_are_refused() -> None:
    names.require_names(_config())
    with pytest.raises(InvDiffError, match=r"--model.inference=x: expected one of mixture, "):
        names.require_names(_config(inference="x"))
    for flag in ("--model.inference=x", "--model.init_args.inference=x"):
        with pytest.raises(InvDiffError, match=r"--model.inference=x: "):
            names.require_names(_config(), [flag])
    with pytest.raises(InvDiffError, match=r"--evaluation.extractor=x: "):
        names.require_names({"evaluation": {"extractor": "x"}})


def test_names_of_other_peoples_modules_are_theirs() -> None:
    config = {"model": {"class_path": "mine.Inference", "init_args": {"score": "mine"}}}
    names.require_names(config)
