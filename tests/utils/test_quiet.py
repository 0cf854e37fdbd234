"""Library messages that are kept from the user."""

import logging
import os
import subprocess
import sys

import pytest
from pytorch_lightning import seed_everything

from invdiff_pl.utils.quiet import silence


def test_setting_a_seed_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    silence()
    with caplog.at_level(logging.INFO):
        seed_everything(0)
    assert "Seed" not in caplog.text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_terminal_lacks_become_question_marks(encoding: str) -> None:
    code = (
        "import sys; from invdiff_pl.utils.quiet import write_what_can_be_encoded as ready\n"
        "ready(); print('\u732b.'); print('\u732b!', file=sys.stderr)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert (found.stdout, found.stderr) == (b"?.\n", b"?!\n")
