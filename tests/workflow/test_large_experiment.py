"""`SCALE=sd14` from end to end: the published architecture with a tenth of its channels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from invdiff_pl.backbones.pipeline import save_pipeline
from invdiff_pl.backbones.stable_diffusion import random_stable_diffusion
from invdiff_pl.cli.main import main
from invdiff_pl.utils.files import read_json

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = [
    "--scale.classifier_steps=1",
    "--classifier.data.batch_size=2",
    "--environments.model.settings.starts=4",
    "--environments.model.settings.values=[]",
    "--scale.adapter_steps=2",
    "--scale.adapter_batch=4",
    "--scale.max_micro_batch=2",
    "--scale.adapter_warmup=1",
    "--scale.calibration_samples=4",
    "--scale.calibration_steps=2",
    "--scale.samples_per_prompt=2",
    "--scale.sampling_batch=2",
    "--scale.sampling_steps=1",
    "--scale.guidance_scale=7.5",
    "--model.train_without_bias=true",
    "--experiment.cache_dir=cache",
]


def _photographs(root: Path) -> None:
    """Noise of 600×512 pixels in the published layout: one a (split, kind, background)."""
    source = np.random.default_rng(0)
    lines = ["img_id,img_filename,y,split,place"]
    for number in range(12):
        split, kind, place = number // 4, number // 2 % 2, number % 2
        name = f"{('001.Cardinal', '002.Mallard')[kind]}/{number}.jpg"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = source.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((600, 512)).save(root / name)
        lines.append(f"{number},{name},{kind},{split},{place}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")


def _settings(folder: Path) -> None:
    """The shipped settings, without the pictures that are drawn while the adapter is trained."""
    shutil.copytree(EXPERIMENTS, folder)
    path = folder / "stages" / "adapter.yaml"
    content = yaml.safe_load(path.read_text())
    content["trainer"]["callbacks"] = [
        entry
        for entry in content["trainer"]["callbacks"]
        if not entry["class_path"].endswith(("SampleGrid", "FitEvaluation"))
    ]
    path.write_text(yaml.safe_dump(content))


@pytest.mark.slow
def test_the_whole_experiment_runs_at_the_large_scale(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    _photographs(tmp_path / "birds")
    _settings(tmp_path / "settings")
    prompts = ["a photo of a cardinal", "a photo of a mallard"]
    save_pipeline(random_stable_diffusion(prompts, seed=0, thinner=10), tmp_path / "backbone")
    words = ["--experiment", "waterbirds", "--scale", "sd14", "--experiments", "settings"]
    given = ["--data", "birds", "--backbone", "backbone", "--run-dir", "run"]
    assert main(["train", *words, *given, *SMALL]) == 0
    report = read_json(tmp_path / "run" / "report" / "report.json")
    assert report["adapter"]["kind"] == "lora"
    with Image.open(next((tmp_path / "run" / "samples").glob("scale-1.00/*.png"))) as sample:
        assert sample.size == (512, 512)
    printed = capfd.readouterr().out
    for stage in ("environments", "adapter", "samples"):
        assert f"memory of stage {stage} on " in printed
    assert "8 images of 512×512 pixels" in printed
