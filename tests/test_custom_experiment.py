"""An experiment on a handful of one's own images, without any label, one of them broken."""

import json
import shutil
from pathlib import Path

import pytest

from invdiff_pl.__main__ import main
from invdiff_pl.files import read_json

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
TINY = [
    "--scale.classifier_steps=3",
    "--scale.adapter_steps=3",
    "--scale.adapter_batch=4",
    "--scale.sampling_steps=1",
    "--scale.samples_per_prompt=2",
    "--evaluation.resolution=32",
    "--environments.model.timesteps=2",
    "--experiment.cache_dir=cache",
    "--data.broken=skip",
    "--data.prompt_column=caption",
]


@pytest.fixture
def pictures(birds: Path, tmp_path: Path) -> Path:
    """Two folders of a few images with a table in each."""
    root = tmp_path / "pictures"
    files = sorted(birds.glob("00[12].*/*.png"))
    for split, chosen in (("train", files[::6]), ("test", files[1::12])):
        lines = []
        for file in chosen:
            (root / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / split)
            kind = file.parent.name.split(".")[1].replace("_", " ").lower()
            lines.append(json.dumps({"file_name": file.name, "caption": f"a photo of a {kind}"}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    next((root / "train").glob("*.png")).write_bytes(b"")
    return root


def test_unlabelled_images_with_a_broken_one_run_to_a_report_that_says_what_is_not_scored(
    pictures, tiny_backbone, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--experiment", "custom", "--experiments", str(EXPERIMENTS)]
    words += ["--data", "pictures", "--backbone", str(tiny_backbone), "--run-dir", "run", *TINY]
    assert main(words) == 0
    count = len(list((pictures / "train").glob("*.png"))) - 1
    assert read_json(tmp_path / "run" / "environments" / "environments.json")["images"] == count
    report = read_json(tmp_path / "run" / "report" / "report.json")
    for figure in ("bias", "prompt_accuracy", "frechet_distance"):
        assert report[figure]["before"] is report[figure]["after"] is None
        assert "no attribute labels" in report[figure]["reason"]
    assert report["environments"]["auc"] is None
    assert report["adapter"]["kind"] == "lora"
    text = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "**Not scored:** pictures has no attribute labels" in text
    assert "bias.png" not in text
    assert (tmp_path / "run" / "report" / "grid.png").is_file()
    absent = read_json(tmp_path / "run" / "classifier" / "classifier" / "classifier.json")
    assert "no attribute labels" in absent["absent"]
