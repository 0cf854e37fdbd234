"""The model card of a new backbone."""

from run_folder import METRICS

from invdiff_pl.report.card import card

CONFIG = {
    "experiment": {"name": "waterbirds", "scale": "mini", "start": "/models/sd"},
    "seed_everything": 0,
    "trainer": {"max_steps": 10},
    "data": {"init_args": {"resolution": 32}},
    "model": {"init_args": {"steps": 20, "guidance_scale": 1.0}},
}
RECORD = {"seconds": 60.0, "hardware": "2 cores", "config": CONFIG}
ONE_SCALE = {**METRICS, "scales": {"0.0": METRICS["scales"]["0.0"]}}


def test_the_card_says_whether_the_backbone_shows_the_bias() -> None:
    records = dict.fromkeys(("autoencoder", "backbone", "backbone_samples"), RECORD)
    assert "0.940 [0.900, 0.980], within 0.1" in card(ONE_SCALE, records)
    unscored = {**METRICS, "scales": None, "reason": "no labels in birds"}
    assert "not measured: no labels in birds" in card(unscored, records)
    unbiased = {**METRICS, "scales": {"0.0": METRICS["scales"]["1.0"]}}
    assert "NOT within 0.1" in card(unbiased, records)


def test_the_card_of_a_fine_tuned_backbone_names_what_it_started_from() -> None:
    record = {
        **RECORD,
        "command": ["python", "fit", "--config=a.yaml", "--scale.backbone_steps=10"],
    }
    records = dict.fromkeys(("backbone", "backbone_samples"), record)
    text = card(ONE_SCALE, records)
    assert "trained from `/models/sd`, on the biased training split" in text
    assert "BACKBONE=/models/sd" in text
    assert 'ARGS="--scale.backbone_steps=10"' in text
    assert "from scratch" not in text


def test_settings_of_the_autoencoder_alone_are_told_as_its_own() -> None:
    both = ["--scale.backbone_steps=10", "--trainer.precision=bf16-mixed"]
    first = {**RECORD, "command": ["fit", *both, "--trainer.precision=32-true"]}
    rest = {**RECORD, "command": ["fit", *both]}
    records = {"autoencoder": first, "backbone": rest, "backbone_samples": rest}
    text = card(ONE_SCALE, records)
    assert f'ARGS="{" ".join(both)} --autoencoder.trainer.precision=32-true"' in text
