"""The model card of a new backbone."""

from run_folder import METRICS

from invdiff_pl.report.card import card


def test_the_card_says_whether_the_backbone_shows_the_bias() -> None:
    record = {
        "seconds": 60.0,
        "hardware": "2 cores",
        "config": {
            "experiment": {"name": "waterbirds", "scale": "mini", "start": "/models/sd"},
            "seed_everything": 0,
            "trainer": {"max_steps": 10},
            "data": {"init_args": {"resolution": 32}},
            "model": {"init_args": {"steps": 20, "guidance_scale": 1.0}},
        },
    }
    records = dict.fromkeys(("autoencoder", "backbone", "backbone_samples"), record)
    one_scale = {**METRICS, "scales": {"0.0": METRICS["scales"]["0.0"]}}
    assert "0.940 [0.900, 0.980], within 0.1" in card(one_scale, records)
    unscored = {**METRICS, "scales": None, "reason": "no labels in birds"}
    assert "not measured: no labels in birds" in card(unscored, records)
    unbiased = {**METRICS, "scales": {"0.0": METRICS["scales"]["1.0"]}}
    assert "NOT within 0.1" in card(unbiased, records)


def test_the_card_of_a_fine_tuned_backbone_names_what_it_started_from() -> None:
    config = {
        "experiment": {"name": "waterbirds", "scale": "mini", "start": "/models/sd"},
        "seed_everything": 0,
        "trainer": {"max_steps": 10},
        "data": {"init_args": {"resolution": 32}},
        "model": {"init_args": {"steps": 20, "guidance_scale": 1.0}},
    }
    record = {"seconds": 60.0, "hardware": "2 cores", "config": config}
    record["command"] = ["python", "fit", "--config=a.yaml", "--scale.backbone_steps=10"]
    records = dict.fromkeys(("backbone", "backbone_samples"), record)
    text = card({**METRICS, "scales": {"0.0": METRICS["scales"]["0.0"]}}, records)
    assert "trained from `/models/sd`, on the biased training split" in text
    assert "BACKBONE=/models/sd" in text
    assert 'ARGS="--scale.backbone_steps=10"' in text
    assert "from scratch" not in text


def test_settings_of_the_autoencoder_alone_are_told_as_its_own() -> None:
    config = {
        "experiment": {"name": "waterbirds", "scale": "mini", "start": ""},
        "seed_everything": 0,
        "trainer": {"max_steps": 10},
        "data": {"init_args": {"resolution": 32}},
        "model": {"init_args": {"steps": 20, "guidance_scale": 1.0}},
    }
    record = {"seconds": 60.0, "hardware": "2 cores", "config": config}
    both = ["--scale.backbone_steps=10", "--trainer.precision=bf16-mixed"]
    first = {**record, "command": ["fit", *both, "--trainer.precision=32-true"]}
    rest = {**record, "command": ["fit", *both]}
    records = {"autoencoder": first, "backbone": rest, "backbone_samples": rest}
    text = card({**METRICS, "scales": {"0.0": METRICS["scales"]["0.0"]}}, records)
    assert f'ARGS="{" ".join(both)} --autoencoder.trainer.precision=32-true"' in text
