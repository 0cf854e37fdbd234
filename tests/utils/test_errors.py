import pickle
import re
from pathlib import Path

import pytest

import invdiff_pl
from invdiff_pl.utils.errors import InvDiffError, in_flags

ROOMS = ("adapters", "backbones", "data", "environments", "metrics", "modules", "objectives")


def test_an_error_names_arguments_and_under_the_command_line_its_flags() -> None:
    error = InvDiffError("adapter=loraa: expected one of lora, small_unet.", "adapter")
    assert str(error) == "adapter=loraa: expected one of lora, small_unet."
    assert error.arguments == ("adapter",)
    told = error.in_flags({"adapter": "--model.adapter", "root": "--data.root"})
    assert str(told) == "--model.adapter=loraa: expected one of lora, small_unet."
    assert isinstance(told, ValueError)


def test_the_key_of_an_argument_follows_its_flag() -> None:
    error = InvDiffError("`settings.layers`: no such; settings.rank=2", "settings.layers")
    told = str(error.in_flags({"settings": "--model.settings"}))
    assert told == "--model.settings.layers: no such; settings.rank=2"


def test_only_arguments_that_an_error_declares_are_told_as_flags() -> None:
    error = InvDiffError("the caption 'seed=3' of root=x", "root", "unknown")
    told = error.in_flags({"root": "--data.root", "seed": "--data.seed"})
    assert str(told) == "the caption 'seed=3' of --data.root=x"
    assert error.in_flags({}) is error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("leave it out with broken=skip", "leave it out with --data.broken=skip"),
        ("(`broken`), or broken=", "(--data.broken), or --data.broken="),
        ("broken images of /x/broken=1/a.png", "broken images of /x/broken=1/a.png"),
        ("--data.broken=skip, unbroken=1", "--data.broken=skip, unbroken=1"),
    ],
)
def test_flags_take_the_place_of_arguments_and_of_no_other_words(text: str, told: str) -> None:
    assert in_flags(text, {"broken": "--data.broken"}) == told


def test_an_error_reaches_another_process_with_its_arguments() -> None:
    error = pickle.loads(pickle.dumps(InvDiffError("rank=0: expected 1", "rank")))
    assert (str(error), error.arguments) == ("rank=0: expected 1", ("rank",))


def test_the_library_names_no_flag() -> None:
    package = Path(invdiff_pl.__file__).parent
    flag = re.compile(r"--(model|data|trainer|scale|evaluation|experiment)\.")
    files = [file for room in ROOMS for file in (package / room).rglob("*.py")]
    assert len(files) > 80
    assert [str(file) for file in files if flag.search(file.read_text(encoding="utf-8"))] == []
