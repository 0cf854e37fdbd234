"""Library messages that are kept from the user."""

import logging

import pytest
from pytorch_lightning import seed_everything

from invdiff_pl.utils.quiet import silence


def test_setting_a_seed_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    silence()
    with caplog.at_level(logging.INFO):
        seed_everything(0)
    assert "Seed" not in caplog.text
