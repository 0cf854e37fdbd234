"""An experiment on a handful of one's own images: one prompt, odd names, no label, one broken."""

import json
import shutil
from pathlib import Path

import pytest
from child_processes import stages_in_this_process

from invdiff_pl.cli.main import main
from invdiff_pl.utils.files import read_json

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = [
    "--scale.classifier_steps=3",
    "--scale.adapter_steps=3",
    "--scale.calibration_samples=12",
    "--scale.calibration_steps=2",
    "--scale.adapter_batch=4",
    "--scale.sampling_steps=1",
    "--scale.samples_per_prompt=2",
    "--evaluation.resolution=32",
    "--environments.model.settings.starts=4",
    "--environments.model.settings.values=[]",
    "--experiment.cache_dir=cache",
    "--data.broken=skip",
    "--data.min_images_per_prompt=1",
]


@pytest.fixture
def pictures(birds: Path, tmp_path: Path) -> Path:
    """Two folders of a few images with a table in each."""
    root = tmp_path / "Bilder größer als ü"
    files = sorted(birds.glob("00[12].*/*.png"))
    for split, chosen in (("train", files[::6]), ("test", files[1::12])):
        (root / split).mkdir(parents=True, exist_ok=True)
        names = [f"Vögel 鳥 {number}.png" for number in range(len(chosen))]
        for file, name in zip(chosen, names, strict=True):
            shutil.copy(file, root / split / name)
        rows = [{"file_name": name, "caption": "a photo of a bird"} for name in names]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (root / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    next((root / "train").glob("*.png")).write_bytes(b"")
    return root


def test_unlabelled_images_run_to_a_report_that_says_what_is_not_scored(
    pictures, tiny_backbone, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--experiment", "custom", "--experiments", str(EXPERIMENTS)]
    words += ["--data", pictures.name, "--backbone", str(tiny_backbone), "--run-dir", "run", *TINY]
    with stages_in_this_process():
        assert main(words) == 0
    told = capfd.readouterr().out
    assert "there is only one prompt: a bias shows in how prompts differ" in told
    assert "bias not tested" in told
    assert "confidence" not in told
    count = len(list((pictures / "train").glob("*.png"))) - 1
    environments = read_json(tmp_path / "run" / "environments" / "environments.json")
    assert environments["images"] == count
    assert environments["prompts"] == ["a photo of a bird"]
    report = read_json(tmp_path / "run" / "report" / "report.json")
    for figure in ("bias", "prompt_accuracy", "frechet_distance"):
        assert report[figure]["before"] is report[figure]["after"] is None
        assert "no attribute labels" in report[figure]["reason"]
    assert report["environments"]["auc"] is None
    assert report["adapter"]["kind"] == "lora"
    assert report["adapter"]["trained"] is False
    assert "did not test for a bias" in report["adapter"]["reason"]
    text = (tmp_path / "run" / "report" / "report.md").read_text()
    assert f"**Not scored:** {pictures.name} has no attribute labels" in text
    assert "**Nothing was trained:** the inference did not test for a bias" in text
    assert "| bias found | not tested: " in text
    assert "bias.png" not in text
    assert (tmp_path / "run" / "report" / "grid.png").is_file()
    absent = read_json(tmp_path / "run" / "classifier" / "classifier" / "classifier.json")
    assert "no attribute labels" in absent["absent"]
