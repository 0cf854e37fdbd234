"""The commands of README and docs: targets, variables, commands and flags that there are."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from invdiff_pl.cli import experiment as runner
from invdiff_pl.cli.lightning import check
from invdiff_pl.cli.main import main
from invdiff_pl.workflow.stages import LIGHTNING, PLANS, STAGES

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def _lines(text: str) -> list[str]:
    """Lines of the blocks that are not of a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    commands = [block for language, block in blocks if language in ("", "bash", "sh")]
    return [line for block in commands for line in block.splitlines() if line.strip()]


README_LINES = [
    line for line in _lines(PAGES[0].read_text(encoding="utf-8")) if line.startswith("make ")
]


def test_the_readme_has_commands() -> None:
    assert len(README_LINES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_variables_and_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))
    for line in [*_lines(text), *(" ".join(words.split()) for words in inline)]:
        if match := re.match(r"make ([a-z-]+)(.*)", line):
            target, rest = match.groups()
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), line
            outside = re.sub(r'"[^"]*"', "", rest.split("#")[0])
            for variable in re.findall(r"\b([A-Z_]+3?)=", outside):
                assert re.search(rf"^{variable} +\?=", MAKEFILE, re.MULTILINE), line
        if match := re.search(r"python -m invdiff_pl ([a-z]+)", line):
            assert match[1] in _commands(), line


def _commands() -> set[str]:
    text = (REPOSITORY / "invdiff_pl" / "cli" / "main.py").read_text(encoding="utf-8")
    return set(re.findall(r"^  ([a-z]+)  ", text, flags=re.MULTILINE))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("line", README_LINES, ids=lambda line: line.split("#")[0].strip())
def test_what_make_would_run_is_understood(line: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(REPOSITORY)
    told = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "MAKEFLAGS": "n"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for words in map(shlex.split, told.replace("\\\n", " ").splitlines()):
        if words[1:3] != ["-m", "invdiff_pl"]:
            continue
        command, arguments = words[3], words[4:]
        if command not in PLANS:
            with pytest.raises(SystemExit):
                main([command, "--help"])
            known = capsys.readouterr().out
            assert all(w in known for w in arguments if w.startswith("--"))
            continue
        experiment = runner.experiment_of(command, arguments)
        for name in PLANS[command]:
            if STAGES[name].command in LIGHTNING and experiment.overrides.get(name):
                check(experiment.arguments(STAGES[name]))
