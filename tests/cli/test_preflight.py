"""A data set of one's own is looked over before the first stage; no stage is started here."""

import json
from pathlib import Path

import pytest
from PIL import Image

from invdiff_pl.cli.experiment import experiment_of
from invdiff_pl.cli.main import main
from invdiff_pl.cli.preflight import check_data
from invdiff_pl.workflow.due import fingerprint
from invdiff_pl.workflow.stages import STAGES

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
WORDS = "--data.prompts_from=words:nurse,doctor"


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty images whose captions occur once each."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "my pictures (2024): $1 #2"
    root.mkdir()
    rows = []
    for number in range(40):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(root / f"{number}.png")
        caption = f"a {('nurse', 'doctor')[number % 2]}, no. {number}"
        rows.append({"image": f"{number}.png", "caption": caption, "split": "train"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def _words(root: Path, *flags: str) -> list[str]:
    words = ["--experiment", "custom", "--experiments", str(EXPERIMENTS), "--data", root.name]
    return [*words, "--backbone", "asset:waterbirds", *flags]


def _lines(root: Path, *flags: str) -> list[str]:
    experiment = experiment_of("train", _words(root, *flags))
    return check_data(experiment, experiment.plan("train"))


def test_captions_that_occur_once_each_are_refused_in_one_line_before_anything_runs(
    pictures, capsys
) -> None:
    assert main(["train", *_words(pictures)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "captions occur once each, 40 captions of 40 images" in error
    for flag in ("--data.prompt=", "--data.prompt_map=", "--data.prompts_from=words:"):
        assert flag in error
    assert not Path("runs").exists()


def test_what_was_read_and_how_many_samples_will_be_drawn_is_told(pictures) -> None:
    lines = _lines(pictures, WORDS, "--data.attribute_column=split")
    assert lines[0].startswith("metadata.jsonl: images by the column 'image', captions by 'capt")
    assert lines[1:] == [
        "40 images of 2 prompts: 40 train, 0 val, 0 test",
        "2 prompts × 512 samples × 2 invariant scales: 2,048 samples",
    ]
    one = _lines(
        pictures, "--data.prompt=it costs $5, (or $6)", "--samples.model.invariant_scales=[1]"
    )
    assert "only one prompt" in one[-2]
    assert one[-1] == "1 prompts × 512 samples × 1 invariant scales: 512 samples"


def test_more_samples_than_the_bound_are_refused_before_anything_runs(pictures, capsys) -> None:
    assert main(["train", *_words(pictures, WORDS, "--scale.max_samples=2000")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "2,048 samples would be drawn, more than --scale.max_samples=2000" in error
    assert "--scale.samples_per_prompt=500" in error
    assert "--scale.max_samples=2048" in error
    assert not Path("runs").exists()


def test_the_bound_makes_no_stage_due_and_a_changed_mapping_does(pictures) -> None:
    def prints(*flags: str) -> dict[str, str]:
        experiment = experiment_of("train", _words(pictures, *flags))
        return {name: fingerprint(experiment, STAGES[name]) for name in ("classifier", "samples")}

    assert prints("--scale.max_samples=5")["samples"] == prints()["samples"]
    Path("map.csv").write_text("caption,prompt\nx,y\n")
    before = prints("--data.prompt_map=map.csv")
    Path("map.csv").write_text("caption,prompt\nx,z\n")
    after = prints("--data.prompt_map=map.csv")
    assert all(before[name] != after[name] for name in before)


def test_a_picture_added_behind_a_followed_link_makes_stages_due(pictures) -> None:
    def print_of(*flags: str) -> str:
        return fingerprint(experiment_of("train", _words(pictures, *flags)), STAGES["classifier"])

    other = Path("elsewhere")
    other.mkdir()
    (pictures / "more").symlink_to(other.absolute())
    refused, followed = print_of(), print_of("--data.links=follow")
    (other / "new.png").write_bytes(b"")
    assert print_of() == refused
    assert print_of("--data.links=follow") != followed


ODD = [
    'a "quoted" prompt\'s',
    "<b>bold</b> & more",
    "一张猫的照片",
    "صورة قطة",
    "a\nb\tc",
    "x" * 400,
    "-",
]


def test_odd_prompts_pass_the_check(pictures, capsys) -> None:
    prompts = [*ODD, "costs $5 or $6", "${x}", "🐶 | dog"]
    rows = []
    for number in range(8 * len(prompts)):
        Image.new("RGB", (32, 32)).save(pictures / f"{number}.png")
        text = prompts[number // 8]
        rows.append({"file_name": f"{number}.png", "text": text, "split": "train"})
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--experiment", "custom", "--experiments", str(EXPERIMENTS), "--data", pictures.name]
    assert main(["check", *words]) == 0
    text = capsys.readouterr().out
    assert "80 images of 10 prompts" in text
    assert "costs $5 or $6" in text
    assert "a b c" in text
    assert "x" * 100 not in text
