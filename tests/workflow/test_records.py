"""Records of stages: what is verified, what is redone and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from invdiff_pl.cli.main import main
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_json
from invdiff_pl.workflow.due import begin, finish, is_current
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.records import (
    read_record,
    refresh,
    require_intact,
    write_listing,
    write_record,
)
from invdiff_pl.workflow.stages import STAGES

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def experiment(tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(tmp_path)
    folder = REPOSITORY / "experiments"
    return Experiment(
        files=tuple(folder / n for n in ("waterbirds.yaml", "base.yaml", "scales/mini.yaml")),
        experiments=folder,
        flags=("--experiment.run_dir=run", f"--experiment.backbone={tiny_backbone}"),
        overrides={},
        rendered=True,
    )


@pytest.fixture
def finished(experiment: Experiment) -> Experiment:
    """Environments and adapter are finished, with a few files each."""
    for name in ("environments", "adapter"):
        stage = STAGES[name]
        begin(experiment, stage)
        (experiment.folder(stage) / "inner").mkdir()
        (experiment.folder(stage) / "inner" / "weights.safetensors").write_bytes(b"weights")
        (experiment.folder(stage) / "facts.json").write_text("{}")
        (experiment.folder(stage) / ".facts.json.partial-0a1b2c3d").write_text("{")
        finish(experiment, stage, {"seconds": 1.0})
    return experiment


def _verify(capsys) -> tuple[int, str]:
    capsys.readouterr()
    return main(["verify", "run"]), capsys.readouterr().out


def test_a_whole_run_is_verified(finished, capsys) -> None:
    status, text = _verify(capsys)
    assert (status, text.splitlines()[-1]) == (0, "every recorded file is present and unaltered")
    assert not list(Path("run").rglob("*.partial-*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p.unlink(), "missing: run/adapter/inner/weights.safetensors"),
        (lambda p: p.write_bytes(b"weighty"), "altered: run/adapter/inner/weights.safetensors"),
        (lambda p: p.write_bytes(b"weigh"), "cut: run/adapter/inner/weights.safetensors"),
        (lambda p: (p.parent.parent / "files.json").write_text("{}"), "altered: run/adapter/files"),
    ],
)
def test_what_is_missing_or_altered_is_named_and_the_status_is_1(
    change, told, finished, capsys
) -> None:
    change(Path("run/adapter/inner/weights.safetensors"))
    status, text = _verify(capsys)
    assert status == 1
    assert told in text


def test_files_that_came_later_are_only_noted(finished, capsys) -> None:
    Path("run/adapter/notes.txt").write_text("mine")
    status, text = _verify(capsys)
    assert status == 0
    assert "note: not on record: run/adapter/notes.txt" in text


def test_a_folder_without_a_run_is_refused(tmp_path, capsys) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no stage" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stage.json", "files.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprint": 1}', "\xff\xfe"])
def test_damaged_records_are_refused_with_what_to_do(name, content, finished) -> None:
    Path("run/adapter", name).write_text(content, encoding="latin-1")
    with pytest.raises(InvDiffError, match=r"run/adapter.* run the same command again"):
        is_current(finished, STAGES["adapter"])


def test_a_record_changed_by_hand_is_refused(finished) -> None:
    path = Path("run/adapter/stage.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "seconds": 2.0}))
    with pytest.raises(InvDiffError, match="was changed after the stage had written it"):
        is_current(finished, STAGES["adapter"])


@pytest.mark.parametrize(
    "listing",
    [
        {"../precious.txt": {"bytes": 1, "digest": "x"}},
        {"/etc/passwd": {"bytes": 1, "digest": "x"}},
        {"a": 3},
        {"a": {"bytes": "many"}},
    ],
)
def test_a_list_of_files_from_elsewhere_cannot_reach_out_of_its_folder(
    listing, finished, tmp_path
) -> None:
    precious = Path("run/precious.txt")
    precious.write_text("mine")
    folder, stage = Path("run/adapter"), STAGES["adapter"]
    record = read_record(folder / "stage.json")
    assert record is not None
    (folder / "files.json").write_text(json.dumps(listing))
    write_record(
        folder / "stage.json", {**record, "files": {"digest": digest_json(listing), "count": 1}}
    )
    with pytest.raises(InvDiffError, match=r"files\.json"):
        begin(finished, stage)
    assert precious.read_text() == "mine"


def test_altered_output_is_refused_by_the_stage_that_would_read_it(finished) -> None:
    Path("run/environments/facts.json").write_text("[]")
    with pytest.raises(InvDiffError, match=r"run/environments/facts\.json is altered"):
        begin(finished, STAGES["adapter"])


def test_a_finished_stage_with_a_missing_file_goes_on_and_keeps_the_others(finished) -> None:
    stage = STAGES["adapter"]
    Path("run/adapter/facts.json").unlink()
    Path("run/adapter/inner/weights.safetensors").write_bytes(b"wei")
    assert not is_current(finished, stage)
    assert begin(finished, stage)
    assert not Path("run/adapter/stage.json").exists()
    assert [p.name for p in Path("run/adapter").rglob("*") if p.is_file()] == [
        "files.json",
        "started.json",
    ]


def test_what_was_trained_before_a_changed_setting_is_put_aside(finished, experiment) -> None:
    other = Experiment(**{**vars(finished), "overrides": {"adapter": ("--model.lambda_=3",)}})
    assert not begin(other, STAGES["adapter"])
    assert Path("run/previous/adapter/inner/weights.safetensors").read_bytes() == b"weights"


def test_a_cleared_folder_is_never_taken_for_a_whole_one(finished, monkeypatch) -> None:
    def killed(path: Path, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    other = Experiment(**{**vars(finished), "overrides": {"environments": ("--model.block=x",)}})
    with pytest.raises(KeyboardInterrupt):
        begin(other, STAGES["environments"])
    assert not is_current(finished, STAGES["environments"])


def test_a_report_written_anew_by_hand_is_recorded_anew(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("first")
    write_record(tmp_path / "stage.json", {"fingerprint": "f", "files": write_listing(tmp_path)})
    (tmp_path / "report.md").write_text("second")
    with pytest.raises(InvDiffError, match=r"report\.md is altered"):
        require_intact(tmp_path)
    refresh(tmp_path)
    require_intact(tmp_path)
    assert read_record(tmp_path / "stage.json")


def test_links_in_a_run_folder_are_not_followed_when_it_is_cleared(finished, tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("mine")
    os.symlink(outside, "run/environments/link")
    other = Experiment(**{**vars(finished), "overrides": {"environments": ("--model.block=x",)}})
    begin(other, STAGES["environments"])
    assert (outside / "precious.txt").read_text() == "mine"
