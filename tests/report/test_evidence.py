"""``make evidence``: its rows are commands that parse, and its tables what their folders hold."""

import argparse
import json
import shlex
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from run_folder import write_run

from invdiff_pl.cli.experiment import experiment_of
from invdiff_pl.cli.lightning import check
from invdiff_pl.report.run import write_report
from invdiff_pl.workflow.records import write_record
from invdiff_pl.workflow.stages import LIGHTNING, PLANS, STAGES

REPOSITORY = Path(__file__).parents[2]
FIGURES = {
    "bias": {"mean": 0.1, "interval": [0.05, 0.15]},
    "prompt_accuracy": {"mean": 0.98},
    "frechet_distance": 420.0,
    "manifold": {"precision": 0.7, "recall": 0.6},
}
METHODS = {"nothing": {"reason": "by hand"}, "ours_prompts": FIGURES, "clusters_0.2": FIGURES}


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return import_module("evidence")


def _finish(folder: Path, revision: str = "abc") -> None:
    """A finished run by hand."""
    write_run(folder)
    for stage in ("samples", "adapter"):
        record = json.loads((folder / stage / "stage.json").read_text())
        write_record(folder / stage / "stage.json", {**record, "revision": revision})
    (folder / "adapter" / "calibration.json").write_text('{"scale": 1.06, "reason": "by hand"}')
    write_report(folder, seed=0)


def _check_flags(script: ModuleType, commands: list[tuple[str, ...]], monkeypatch) -> None:
    read = argparse.ArgumentParser.parse_args

    def parse_args(*given, **named):
        read(*given, **named)
        raise SystemExit("read")  # what a script does next is not run here

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        for command in commands:
            patched.setattr("sys.argv", [script.__name__, *command])
            with pytest.raises(SystemExit, match="read"):
                script.main()


def test_every_command_is_one_that_the_command_line_takes(evidence, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    parsed, scripts = set(), defaultdict(list)
    for row in evidence.rows(tmp_path).values():
        if row.kind in PLANS:
            _, _, command, *words = row.command
            experiment = experiment_of(command, words)
            key = (experiment.files, bool(experiment.overrides))
            if key not in parsed:  # seeds differ in nothing that is parsed
                for name in PLANS[command]:
                    if STAGES[name].command in LIGHTNING and experiment.overrides.get(name):
                        check(experiment.arguments(STAGES[name]))
            parsed.add(key)
        else:
            scripts[Path(row.command[0])].append(row.command[1:])
    assert parsed
    for script, commands in scripts.items():
        monkeypatch.syspath_prepend(str(REPOSITORY / script.parent))
        _check_flags(import_module(script.stem), commands, monkeypatch)


def test_three_seeds_of_every_set_and_ratio_have_a_row(evidence, tmp_path) -> None:
    names = list(evidence.rows(tmp_path))
    starts = ("waterbirds", "celeba-1_2_2_1", "fairface-8_4_1_1", "transformer", "prompts-celeba")
    for start in starts:
        assert {f"{start}-{seed}" for seed in (0, 1, 2)} <= set(names)
    # What a row reads of another comes before it.
    assert names.index("celeba-1_2_2_1-backbone") < names.index("celeba-1_2_2_1-0")
    for earlier in ("waterbirds-0", "prompts-waterbirds-0"):
        assert names.index(earlier) < names.index("prompts-waterbirds-0-peers")
    assert names.index("packages") < names.index("birds-0.95-50") < names.index("photographs")


def test_tables_tell_figures_digests_and_revisions_of_what_is_there(evidence, tmp_path) -> None:
    _finish(tmp_path / "waterbirds-0")
    _finish(tmp_path / "waterbirds-1", "def")
    evidence.write(tmp_path)
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert list(found) == ["waterbirds-0", "waterbirds-1"]
    assert found["waterbirds-1"]["revisions"] == ["def"]
    digest = found["waterbirds-0"]["digest"]
    assert digest != found["waterbirds-1"]["digest"]
    text = (tmp_path / "tables.md").read_text()
    assert "at revision abc, def." in text
    row = f"| waterbirds-0 | {digest} | 0.900 | 0.940 [0.900, 0.980] | 0.080 [0.040, 0.120] | "
    row += (
        "99.0 → 98.0 % | 450.0 → 420.0 | 0.700 → 0.700 | 0.940 → 0.080 | 0.988 / – | 1.06 | bias |"
    )
    assert row in text
    assert "Rows that have not been run: waterbirds-2, celeba-1_4_4_1-0, " in text


def test_the_tables_of_what_is_there_are_written_without_running_anything(
    evidence, tmp_path, monkeypatch, capsys
) -> None:
    _finish(tmp_path / "waterbirds-0")
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: pytest.fail("ran"))
    evidence.main(["--output", str(tmp_path), "--tables"])
    assert "| waterbirds-0 | " in capsys.readouterr().out


def test_a_table_is_read_from_what_its_row_wrote_or_printed(
    evidence, tmp_path, monkeypatch
) -> None:
    def ran(words, **_):
        if "--output" in words:
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(exist_ok=True)
            (folder / "peers.md").write_text("| method |\n| --- |\n| ours |\n")
            (folder / "peers.json").write_text(json.dumps(METHODS))
            return evidence.subprocess.CompletedProcess(words, 0)
        printed = b"| data set |\n| --- |\ndrawing birds: image 5 of 9\n| birds |\n"
        return evidence.subprocess.CompletedProcess(words, 0, printed)

    monkeypatch.setattr(evidence.subprocess, "run", ran)
    for revision in ("abc", "def"):  # the second call changes nothing
        monkeypatch.setattr(evidence, "provenance", lambda now=revision: {"revision": now})
        evidence.main(["--output", str(tmp_path), "--only", "prompts-celeba-0-peers", "two-bias"])
    found = json.loads((tmp_path / "evidence.json").read_text())
    (tmp_path / "two-biases" / "done.json").unlink()  # as if it had been stopped before
    evidence.main(["--output", str(tmp_path), "--only", "two-biases"])
    again = json.loads((tmp_path / "evidence.json").read_text())
    assert again["two-biases"]["revisions"] == ["def"]
    assert found["prompts-celeba-0-peers"]["revisions"] == found["two-biases"]["revisions"]
    assert found["two-biases"]["revisions"] == ["abc"]
    text = (tmp_path / "tables.md").read_text()
    digest = found["two-biases"]["digest"]
    told = f"### two-biases\n\nDigest {digest}.\n\n| data set |\n| --- |\n| birds |"
    peers = found["prompts-celeba-0-peers"]["digest"]
    row = f"| prompts-celeba-0-peers | {peers} | debiased | 0.100 [0.050, 0.150] | 98.0 % | 420.0 |"
    assert f"{row} 0.700 | 0.600 |" in text
    assert f"| prompts-celeba-0-peers | {peers} | the backbone | – | – | – | – | – |" in text
    assert "| method |\n| --- |\n| ours |" in text  # it compares more methods than these two
    assert told in text


def test_pictures_that_are_there_are_not_built_again(evidence, tmp_path, monkeypatch) -> None:
    ran = []

    def run(words, **_):
        ran.append(words)
        return evidence.subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(evidence.subprocess, "run", run)
    (tmp_path / "birds-0.95-50").mkdir()
    (tmp_path / "birds-0.95-50" / "metadata.csv").touch()
    evidence.main(["--output", str(tmp_path), "--only", "birds-0.95"])
    (words,) = ran
    assert words[words.index("--output") + 1] == str(tmp_path / "birds-0.95-51")


def test_a_failed_row_is_named_and_so_is_an_unknown_one(
    evidence, tmp_path, monkeypatch, capsys
) -> None:
    failed = evidence.subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="waterbirds-0: exit status 2"):
        evidence.main(["--output", str(tmp_path), "--only", "waterbirds-0"])
    with pytest.raises(SystemExit):
        evidence.main(["--only", "bicycles"])
    assert "no row begins with 'bicycles'" in capsys.readouterr().err


def test_the_list_tells_each_row_and_its_command(evidence, capsys) -> None:
    evidence.main(["--list", "--only", "waterbirds-2"])
    name, command = capsys.readouterr().out.splitlines()
    assert name == "waterbirds-2"
    assert shlex.split(command)[:4] == ["python", "-m", "invdiff_pl", "train"]
