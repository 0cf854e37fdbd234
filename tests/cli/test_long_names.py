"""Names that are longer than a file's may be are names of nothing that is there."""

import pytest

from invdiff_pl.cli.main import main

LONG = "x" * 300
TRAIN = ["train", "--experiment", "waterbirds", "--run-dir", "run"]
AUDIT = ["audit", "--prompts", "a dog; a cat", "--backbone", "asset:waterbirds"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--experiment", LONG],
        ["train", "--experiment", "waterbirds", "--scale", LONG],
        [*TRAIN, "--backbone", f"asset:{LONG}"],
        [*TRAIN, "--backbone", f"./{LONG}"],
        [*TRAIN, "--data", LONG],
        [*TRAIN, f"--environments.model.features={LONG}.npy"],
        [*AUDIT, "--lora", LONG],
        ["export", "--run-dir", LONG, "--output", "out"],
        ["compare", LONG, "other"],
        ["sweep", "--runs", LONG],
        ["replay", LONG],
        ["verify", LONG],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "…"),
)
def test_a_name_that_is_too_long_is_refused_as_one_that_is_not_there(
    words: list[str], tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    message = capsys.readouterr().err
    assert status == 2
    assert "File name too long" not in message
    assert LONG in message
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir())
