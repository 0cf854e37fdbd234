"""What is wrong with an argument, in one line; the accounts are jsonargparse's own."""

from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from invdiff_pl.cli.account import one_line


class Base:
    """Of the classes that may be chosen."""


class Chosen(Base):
    """Takes arguments of several types."""

    def __init__(
        self, size: int | None = 1, rate: float = 1.0, kind: Literal["round", "square"] = "round"
    ) -> None:
        self.size, self.rate, self.kind = size, rate, kind


def _told(*flags: str) -> str:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Base, "model")
    parser.add_argument("--config", action="config")
    parser.add_argument("--count", type=int | None)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args([f"--model={__name__}.Chosen", *flags])
    return one_line(str(caught.value))


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--model.size=three", "--model.size=three: expected int or null."),
        ("--model.rate=fast", "--model.rate=fast: expected float."),
        ("--model.kind=flat", "--model.kind=flat: expected one of round, square."),
        ("--model.sise=3", "--model.sise: Chosen has no such setting."),
        ("--count=x", "--count=x: expected int or null."),
        ("--model=Nope", "--model=Nope: expected a class, as module.Class, or a YAML file."),
        ("--config=/nowhere.yaml", "--config: File does not exist: '/nowhere.yaml'"),
        ("--model.class_path=nowhere.Nope", "--model: nowhere.Nope: No module named 'nowhere'"),
    ],
)
def test_a_wrong_argument_is_told_with_its_flag_and_what_was_expected(flag, expected) -> None:
    assert _told(flag) == expected


def test_an_account_of_another_form_is_told_whole() -> None:
    assert one_line("unrecognized arguments:\n  --x=1") == "unrecognized arguments: --x=1"
    assert one_line("") == ""
