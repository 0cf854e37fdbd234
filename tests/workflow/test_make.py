"""What make would run."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["EXP=celeba"], "runs/celeba/mini/tensorboard"),
        (["EXP=fairface", "SCALE=sd14"], "runs/fairface/sd14/tensorboard"),
        (["RUN_DIR=elsewhere"], "elsewhere/tensorboard"),
    ],
)
def test_make_tensorboard_opens_the_folder_that_stages_write_to(
    words: list[str], folder: str
) -> None:
    assert shlex.split(_lines_of_make("tensorboard", *words)[-1])[-2:] == ["--logdir", folder]


@pytest.mark.parametrize("path", ["/x/my birds (2024)", "it's", 'a "b" `c`; d & e', "#1"])
def test_make_hands_every_path_over_as_one_word(path: str) -> None:
    given = [f"DATA={path}", f"BACKBONE={path}", f"RUN_DIR={path}", f"OUTPUT={path}"]
    for target, flags in (
        ("train", ("--data", "--backbone", "--run-dir")),
        ("check-data", ("--data",)),
        ("export", ("--run-dir", "--output")),
        ("sweep", ("--runs",)),
        ("verify", ("verify",)),
        ("replay", ("replay",)),
        ("compare", ("compare",)),
    ):
        words = shlex.split(_lines_of_make(target, *given)[-1])
        assert all(words[words.index(flag) + 1] == path for flag in flags)


def _lines_of_make(*words: str) -> list[str]:
    """What make would run."""
    told = subprocess.run(
        # Without a word of the `make test` that may have started this.
        ["make", "--no-print-directory", "-n", *words],
        check=True,
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
    )
    return told.stdout.strip().splitlines()
