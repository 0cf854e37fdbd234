"""A small flow-matching transformer, built anew."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, SanaPipeline
from tiny_families import made

from invdiff_pl.backbones.architecture import TINY, Architecture
from invdiff_pl.backbones.check import check_backbone
from invdiff_pl.backbones.denoiser import without_padding
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.new_pipeline import new_pipeline
from invdiff_pl.backbones.pipeline import save_pipeline
from invdiff_pl.utils.errors import InvDiffError

PROMPTS = ["a photo of a mallard", "a photo of a song sparrow"]


@pytest.fixture(scope="module")
def pipe() -> SanaPipeline:
    made: SanaPipeline = new_pipeline(replace(TINY, family="sana"), PROMPTS, 0)
    made.set_progress_bar_config(disable=True)
    return made


def test_the_stock_pipeline_loads_its_folder_and_draws_the_same(
    pipe: SanaPipeline, tmp_path: Path
) -> None:
    save_pipeline(pipe, tmp_path)
    assert check_backbone(str(tmp_path)) == "SanaPipeline"
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    denoiser = frozen_denoiser(pipe)
    noise, sources = denoiser.initial_noise([3], seed=0)
    rows = without_padding(denoiser.condition([PROMPTS[1], ""]))
    given, null = ({n: v[k : k + 1] for n, v in rows.items()} for k in (0, 1))
    ours = denoiser.draw(given, null, noise, sources, steps=2, guidance_scale=2.0)
    theirs = stock(
        PROMPTS[1],
        latents=noise,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=32,
        width=32,
        use_resolution_binning=False,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_usual_one_has_a_million_weights_and_sixty_four_tokens() -> None:
    pipe = new_pipeline(Architecture(family="sana"), PROMPTS, 0)
    assert sum(value.numel() for value in pipe.transformer.parameters()) < 1.1e6
    assert frozen_denoiser(pipe).tokens == 64


def test_its_random_text_encoder_tells_prompts_apart(pipe: SanaPipeline) -> None:
    rows = frozen_denoiser(pipe).condition(["a photo of a mallard", "a photo of a sparrow"])
    first, second = rows["prompt_embeds"]
    assert float((first - second).norm(dim=1).max() / first.norm(dim=1).max()) > 0.5


def test_the_same_seed_gives_the_same_weights() -> None:
    weights = [
        new_pipeline(replace(TINY, family="sana"), PROMPTS, seed).transformer.proj_out.weight
        for seed in (4, 4, 5)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_family_that_is_not_built_is_named() -> None:
    with pytest.raises(InvDiffError, match=r"architecture\.family=flux: expected one of sd, sana"):
        new_pipeline(replace(TINY, family="flux"), PROMPTS, 0)


@torch.no_grad()
def test_padding_that_no_prompt_needs_changes_no_prediction(pipe: SanaPipeline) -> None:
    denoiser = frozen_denoiser(pipe)
    rows = denoiser.condition([*PROMPTS, ""])
    short = without_padding(rows)
    tokens = int(rows["prompt_attention_mask"].sum(1).max())
    assert rows["prompt_embeds"].shape[1] == 300
    assert {value.shape[1] for value in short.values()} == {tokens}
    noisy, timesteps = torch.randn(3, *denoiser.latent_shape), torch.tensor([1, 500, 999])
    predicted = [denoiser.predict(noisy, timesteps, each) for each in (rows, short)]
    torch.testing.assert_close(*predicted, atol=1e-5, rtol=1e-5)


def test_padding_is_kept_where_a_prompt_has_no_token_of_its_own() -> None:
    rows = frozen_denoiser(made("sana"), 32).condition(["a photo of a nurse", ""])
    assert not rows["prompt_attention_mask"][1].any()
    assert without_padding(rows)["prompt_embeds"].shape == rows["prompt_embeds"].shape
    unmasked = {"prompt_embeds": torch.ones(1, 16, 4)}
    assert without_padding(unmasked)["prompt_embeds"].shape == (1, 16, 4)
