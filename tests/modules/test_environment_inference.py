"""Inference of environments under a stock trainer, on any loader of latents and prompts."""

from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader
from trainers import QUICK

from invdiff_pl.backbones.new_pipeline import tiny_pipeline
from invdiff_pl.callbacks import SaveEnvironments
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.environments.features import DenoisingLosses, image_features
from invdiff_pl.environments.partition import partition
from invdiff_pl.modules import EnvironmentInference
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json

PROMPTS = ("a nurse", "a pilot")
COUNT = 24
NUMBERS = torch.arange(COUNT) % 2
TEXTS = [PROMPTS[number] for number in NUMBERS.tolist()]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(list(PROMPTS))


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(COUNT, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def _predict(
    pipe: Any, latents: Tensor, callbacks: tuple = (), batch_size: int = 10, **settings: Any
) -> EnvironmentInference:
    rows = [{"latents": one, "prompt": text} for one, text in zip(latents, TEXTS, strict=True)]
    module = EnvironmentInference(pipe, **{"settings": QUICK, **settings})
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.predict(
        module, DataLoader(cast(Any, rows), batch_size=batch_size), return_predictions=False
    )
    return module


def test_texts_and_latents_are_all_that_a_loader_needs_to_give(pipe, latents) -> None:
    module = _predict(pipe, latents)
    expected = image_features(pipe, latents)
    torch.testing.assert_close(module.features, expected, rtol=2e-3, atol=1e-3)
    assert module.prompts.tolist() == NUMBERS.tolist()
    assert module.found[0].memberships.shape == (COUNT, 2)


def test_losses_and_the_papers_partition_may_be_asked_for(pipe, latents) -> None:
    module = _predict(pipe, latents, features="losses", inference="partition")
    losses = DenoisingLosses(module.frozen)(latents, module.known.conditions()[NUMBERS])
    torch.testing.assert_close(module.features.float(), losses, rtol=2e-3, atol=2e-3)
    (found,) = module.found
    scores = module.features.double().mean(1)
    assert torch.equal(found.memberships.argmax(1), partition(scores, NUMBERS))
    assert found.verdict == "untestable"


def test_features_of_ones_own_take_the_place_of_a_pass(
    pipe, latents, tmp_path, monkeypatch
) -> None:
    own = torch.randn(COUNT, 6)
    np.save(tmp_path / "own.npy", own.numpy())
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("it was asked"))
    module = _predict(pipe, latents, features=str(tmp_path / "own.npy"))
    assert torch.equal(module.features, own)
    np.save(tmp_path / "short.npy", own[:5].numpy())
    with pytest.raises(InvDiffError, match=r"found float32 of shape \[5, 6\]; expected .*\[24, D"):
        _predict(pipe, latents, features=str(tmp_path / "short.npy"))


def test_what_is_found_is_written_with_pictures_if_there_are_any(pipe, latents, tmp_path) -> None:
    images = PromptedImages(torch.rand(COUNT, 3, 8, 8), TEXTS)
    events = tmp_path / "events"
    callback = SaveEnvironments(str(tmp_path / "out"), images, tensorboard=str(events))
    module = _predict(pipe, latents, (callback,))
    written = load_file(tmp_path / "out" / "environments.safetensors")
    torch.testing.assert_close(written["scores"], module.found[0].conflict)
    facts = read_json(tmp_path / "out" / "environments.json")
    assert len(facts["candidates"]) == len(module.found)
    assert facts["images"] == COUNT
    assert "auc" not in facts["quality"]  # there are no labels
    assert "Candidate 0" in (tmp_path / "out" / "discover.html").read_text("utf-8")
    shown = EventAccumulator(str(events))
    shown.Reload()
    assert sum("candidate 0" in tag for tag in shown.Tags()["images"]) == len(PROMPTS)


def test_features_that_do_not_vary_make_one_environment(pipe, latents, tmp_path) -> None:
    np.save(tmp_path / "own.npy", np.ones((COUNT, 3), np.float32))
    images = PromptedImages(torch.rand(COUNT, 3, 8, 8), TEXTS)
    callback = SaveEnvironments(str(tmp_path / "out"), images)
    _predict(pipe, latents, (callback,), features=str(tmp_path / "own.npy"))
    facts = read_json(tmp_path / "out" / "environments.json")
    assert (facts["groups"], facts["candidate"], facts["bias_found"]) == (1, None, None)
    assert load_file(tmp_path / "out" / "environments.safetensors")["assignments"].unique() == 0


def test_a_block_that_is_not_there_is_told(pipe, latents) -> None:
    with pytest.raises(InvDiffError, match=r"block='middle'.*mid_block"):
        _predict(pipe, latents, (), block="middle")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"settings": {"alpha": 0.01}}, r"settings.alpha=0.01 with settings.resamples=19"),
        ({"settings": {"strats": 3}}, "settings=strats: expected one of components, starts"),
        ({"inference": "guess"}, "inference=guess: expected one of mixture, partition"),
        ({"features": "block.npy"}, "features=block.npy: expected block, losses"),
        ({"levels": []}, r"levels=\[\]: expected logarithms"),
    ],
)
def test_a_wrong_setting_is_told_before_a_network_is_loaded(settings, message) -> None:
    with pytest.raises(InvDiffError, match=message):
        EnvironmentInference("/no/backbone", **settings)
