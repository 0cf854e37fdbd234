"""The commands of README and docs: targets, variables, commands and flags that there are."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from invdiff_pl.cli import experiment as runner
from invdiff_pl.cli.audit import _parser as audit_parser
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


# Of all pages, with lines that end in a backslash joined.
LINES = list(
    dict.fromkeys(
        line
        for page in PAGES
        for line in _lines(page.read_text(encoding="utf-8").replace("\\\n", ""))
        if line.startswith(("make ", "invdiff "))
    )
)


def test_the_pages_have_commands() -> None:
    assert len(LINES) >= 30


def test_the_readme_and_the_method_are_short() -> None:
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 120 for line in lines)
    words = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8").split()
    assert sum(bool(re.search(r"\w", word)) for word in words) <= 2000


README_ROWS = {
    "Waterbirds, 95 %": "waterbirds",
    "CelebA 1:4:4:1": "celeba-1_4_4_1",
    "CelebA 1:2:2:1": "celeba-1_2_2_1",
    "FairFace 3:2:1:1": "fairface-3_2_1_1",
    "FairFace 8:4:1:1": "fairface-8_4_1_1",
}


def _cells(file: str, first: str, heading: str = "") -> list[list[str]]:
    """Rows of a page's tables whose first cell begins like this, after a heading."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    lines = text[text.index(heading) :].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {first}")]


def _numbers(cells: Sequence[str]) -> list[float]:
    """First number of each cell."""
    return [float(re.findall(r"\d+\.\d+", cell)[0]) for cell in cells]


@pytest.mark.parametrize("name", README_ROWS)
def test_the_figures_of_the_readme_are_those_of_the_evidence(name: str) -> None:
    (quoted,) = _cells("README.md", name)
    names = [f"{README_ROWS[name]}-{seed} " for seed in range(3)]
    runs = [row for each in names for row in _cells("docs/evidence.md", each)]
    data, before, after, accuracy, distance = zip(*(row[2:7] for row in runs), strict=True)
    assert len(data) == 3
    assert {quoted[1]} == set(data)
    assert _numbers(quoted[2].split(", ")) == _numbers(before)
    assert _numbers(quoted[3].split(", ")) == _numbers(after)
    for told, three in ((quoted[4], accuracy), (quoted[5], distance)):  # means
        ends = zip(*(_numbers(cell.split(" → ")) for cell in three), strict=True)
        means = [sum(end) / 3 for end in ends]
        assert _numbers(told.split(" → ")) == pytest.approx(means, abs=0.1)


def test_what_the_readme_tells_of_the_inference_is_in_the_evidence() -> None:
    readme = " ".join(PAGES[0].read_text(encoding="utf-8").split())
    rows = [
        row
        for data in ("waterbirds |", "celeba |", "fairface |")
        for row in _cells("docs/evidence.md", data, "### discovery-fresh")
        if row[2] in ("61", "62", "63") and len(row) > 10
    ]
    biased = [row for row in rows if row[3].strip()]
    balanced = [row for row in rows if not row[3].strip()]
    called = sum(row[9] == "bias" for row in biased)
    clear = sum(float(row[3]) >= 0.99 for row in biased)
    assert f"a bias in {called} of {len(biased)} biased data sets" in readme
    assert f"there in {clear} (AUC 0.99 or more)" in readme
    assert f"something else in {len(biased) - clear} of" in readme
    assert sum(row[9] == "bias" for row in balanced) == 1
    assert f"One of {len(balanced)} balanced sets" in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_there_are(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in _headings(target), link


def _headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


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


def _commands_of(line: str) -> list[list[str]]:
    """Words after ``python -m invdiff_pl`` of what a line would run."""
    if line.startswith("invdiff "):
        return [shlex.split(line, comments=True)[1:]]
    told = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "MAKEFLAGS": "n"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ran = map(shlex.split, told.replace("\\\n", " ").splitlines())
    return [words[3:] for words in ran if words[1:3] == ["-m", "invdiff_pl"]]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("#")[0].strip())
def test_what_a_line_would_run_is_understood(line: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(REPOSITORY)
    for command, *arguments in _commands_of(line):
        if command == "audit":
            audit_parser().parse_args(arguments)
            continue
        if command not in PLANS:
            with pytest.raises(SystemExit):
                main([command, "--help"])
            known = capsys.readouterr().out
            assert all(w.split("=")[0] in known for w in arguments if w.startswith("--"))
            continue
        experiment = runner.experiment_of(command, arguments)
        for name in PLANS[command]:
            if STAGES[name].command in LIGHTNING and experiment.overrides.get(name):
                check(experiment.arguments(STAGES[name]))
