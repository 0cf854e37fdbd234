"""The model card of a new backbone."""

from typing import Any

import pytest
from huggingface_hub import ModelCard
from run_folder import METRICS

from invdiff_pl.report.card import card
from invdiff_pl.report.metadata import with_metadata

CONFIG: dict[str, Any] = {
    "experiment": {"name": "waterbirds", "scale": "mini", "start": "/models/sd"},
    "seed_everything": 0,
    "trainer": {"max_steps": 10},
    "data": {"init_args": {"resolution": 32}},
    "model": {"init_args": {"steps": 20, "guidance_scale": 1.0}},
}
RECORD = {"seconds": 60.0, "hardware": "2 cores", "config": CONFIG}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SANA = {
    "_class_name": "SanaPipeline",
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}
ONE_SCALE = {**METRICS, "scales": {"0.0": METRICS["scales"]["0.0"]}}


def test_the_card_says_whether_the_backbone_shows_the_bias() -> None:
    records = dict.fromkeys(("autoencoder", "backbone", "backbone_samples"), RECORD)
    assert "0.940 [0.900, 0.980], within 0.1" in card(ONE_SCALE, records, INDEX)
    unscored = {**METRICS, "scales": None, "reason": "no labels in birds"}
    assert "not measured: no labels in birds" in card(unscored, records, INDEX)
    unbiased = {**METRICS, "scales": {"0.0": METRICS["scales"]["1.0"]}}
    assert "NOT within 0.1" in card(unbiased, records, INDEX)


def test_the_card_tells_limits() -> None:
    records = dict.fromkeys(("autoencoder", "backbone", "backbone_samples"), RECORD)
    assert "It knows only the words of its prompts." in card(ONE_SCALE, records, INDEX)
    del records["autoencoder"]  # the tokenizer is that of the pipeline it started from
    assert "nor for judging people. Bias and" in card(ONE_SCALE, records, INDEX)


def test_the_card_of_a_fine_tuned_backbone_names_what_it_started_from() -> None:
    record = {
        **RECORD,
        "command": ["python", "fit", "--config=a.yaml", "--scale.backbone_steps=10"],
    }
    records = dict.fromkeys(("backbone", "backbone_samples"), record)
    text = card(ONE_SCALE, records, INDEX)
    assert "trained from `/models/sd`, on the biased training split" in text
    assert "BACKBONE=/models/sd" in text
    assert 'ARGS="--scale.backbone_steps=10"' in text
    assert "from scratch" not in text


def test_the_card_of_a_transformer_names_its_pipeline_and_family() -> None:
    config = {**CONFIG, "experiment": {**CONFIG["experiment"], "family": "sana"}}
    record = {**RECORD, "config": config}
    records = dict.fromkeys(("autoencoder", "backbone", "backbone_samples"), record)
    text = card(ONE_SCALE, records, SANA)
    assert "`diffusers.SanaPipeline.from_pretrained(FOLDER)`" in text
    assert "`AutoencoderDC` and `SanaTransformer2DModel` trained here; `Gemma2Model`" in text
    assert "SEED=0 FAMILY=sana" in text
    del records["autoencoder"]
    text = card(ONE_SCALE, records, SANA)
    assert (
        "`SanaTransformer2DModel` trained here; all other parts are those of `/models/sd`." in text
    )


def test_settings_of_the_autoencoder_alone_are_told_as_its_own() -> None:
    both = ["--scale.backbone_steps=10", "--trainer.precision=bf16-mixed"]
    first = {**RECORD, "command": ["fit", *both, "--trainer.precision=32-true"]}
    rest = {**RECORD, "command": ["fit", *both]}
    records = {"autoencoder": first, "backbone": rest, "backbone_samples": rest}
    text = card(ONE_SCALE, records, INDEX)
    assert f'ARGS="{" ".join(both)} --autoencoder.trainer.precision=32-true"' in text


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4"),
        ("runs/birds", None),  # a folder
        ("asset:waterbirds", None),
        ("/models/sd", None),
        (None, None),
    ],
)
def test_metadata_is_what_the_hub_reads(base, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "birds").mkdir(parents=True)
    (tmp_path / "README.md").write_text(with_metadata("# Birds\n", base, "adapter", "lora"))
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.library_name == "diffusers"
    assert loaded.data.pipeline_tag == "text-to-image"
    assert loaded.data.tags == ["text-to-image", "diffusers", "invdiff", "lora"]
    assert loaded.data.base_model == told
    assert loaded.data.to_dict().get("base_model_relation") == ("adapter" if told else None)
    assert loaded.text.strip() == "# Birds"
