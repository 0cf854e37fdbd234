"""Rows of the peers' table that need no finished run."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from invdiff_pl.backbones.assets import resolve_backbone
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.new_pipeline import tiny_pipeline
from invdiff_pl.backbones.pipeline import frozen

PROMPTS = ("a photo of a mallard", "a photo of a raven")
WORDS = ("land", "water")


@pytest.fixture(scope="module")
def load() -> Any:
    """Imports a module of the benchmarks, as their scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield import_module


def harness(pipeline: Any) -> Any:
    """What rewriting asks of a harness; its images are the conditions that they are drawn of."""

    def images(pipeline: Any, indices: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return condition["prompt_embeds"]

    return SimpleNamespace(
        pipeline=lambda: pipeline,
        data=SimpleNamespace(prompts=PROMPTS),
        words=WORDS,
        device=torch.device("cpu"),
        per_prompt=3,
        prompts=lambda indices: indices // 3,
        images=images,
    )


def test_the_shipped_tokenizer_knows_birds_and_no_places(load: Any) -> None:
    folder = Path(resolve_backbone("asset:waterbirds")) / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    unknown = load("peers_rows").unknown_words(tokenizer, ["a photo of a mallard", "land", "water"])
    assert unknown == ["land", "water"]


def test_rewriting_is_refused_where_the_words_are_unknown(load: Any, tmp_path: Path) -> None:
    rows = load("peers_rows")
    with pytest.raises(load("peers_harness").NotRun, match="no token for 'land', 'water'"):
        rows.rewriting(harness(frozen(tiny_pipeline(PROMPTS))), tmp_path)


def test_rewriting_puts_the_classes_after_a_prompt_in_turn(load: Any, tmp_path: Path) -> None:
    pipeline = frozen(tiny_pipeline([f"{PROMPTS[0]} {word}" for word in WORDS] + [PROMPTS[1]]))
    made = load("peers_rows").rewriting(harness(pipeline), tmp_path)
    texts = ["mallard land", "mallard water", "mallard land", "raven land", "raven water"]
    expected = frozen_denoiser(pipeline).condition([f"a photo of a {text}" for text in texts])
    assert made.images(torch.arange(5)).allclose(expected["prompt_embeds"], atol=1e-6)


def test_the_table_has_intervals_and_says_what_was_not_run(load: Any) -> None:
    measured = {
        "says": "ours",
        "needs": "prompts",
        "parameters": 72384,
        "seconds": 151.2,
        "cost": 1.0,
        "bias": {"mean": 0.07, "interval": [0.0, 0.12]},
        "prompt_accuracy": {"mean": 0.982, "interval": [0.97, 0.99]},
        "frechet_distance": {"reason": "too few images"},
    }
    refused = {"says": "prompt rewriting", "needs": "words", "reason": "there is no word"}
    lines = load("peers").table({"ours": measured, "rewriting": refused}).splitlines()
    assert lines[2] == (
        "| ours | prompts | 72,384 | 151 | 1.00 | 0.070 [0.000, 0.120] | 98.2 % [97.0, 99.0] | – |"
    )
    assert lines[3] == "| prompt rewriting | words | – | – | – | – | – | – |"
    assert lines[5] == "Not run: prompt rewriting (there is no word)."
