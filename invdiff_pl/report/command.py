"""``report`` and ``card``: what a run found, in tables and pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from invdiff_pl.report.card import write_card
from invdiff_pl.report.run import write_report
from invdiff_pl.workflow.records import FILES, refresh, require_intact


def run_report(command: str, arguments: Sequence[str]) -> None:
    """Write a run's report, or a new backbone's model card.

    Raises:
        InvDiffError: if a stage that it covers has not run, or its files were altered since.
    """
    parser = argparse.ArgumentParser(prog=f"python -m invdiff_pl {command}", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder")
    if command == "card":
        write_card(parser.parse_args(arguments).run_dir)
        return
    parser.add_argument("--seed", type=int, default=0, help="the run's seed, shown in the report")
    options = parser.parse_args(arguments)
    for stage in ("environments", "adapter", "samples"):
        if (options.run_dir / stage / FILES).is_file():  # earlier versions recorded no digests
            require_intact(options.run_dir / stage)
    write_report(options.run_dir, options.seed)
    refresh(options.run_dir / "report")
