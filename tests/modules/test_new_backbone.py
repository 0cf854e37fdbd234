"""A new flow-matching backbone: autoencoder, then denoiser, in two steps each."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from birds_data import birds_data
from diffusers import SanaPipeline
from torch.utils.flop_counter import FlopCounterMode
from trainers import quiet_trainer

from invdiff_pl.backbones.architecture import TINY
from invdiff_pl.backbones.draws import generator, logit_normal_timesteps
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.callbacks import LatentScale, ResourceEstimate, SavePipeline
from invdiff_pl.modules import Autoencoder, Backbone
from invdiff_pl.utils.errors import InvDiffError


class _Record(pl.Callback):
    """Keeps every batch, and the loss of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append((batch, float(outputs["loss"])))


@pytest.fixture(scope="module")
def start(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the autoencoder stage leaves."""
    folder = tmp_path_factory.mktemp("autoencoder")
    module = Autoencoder(architecture=replace(TINY, family="sana"))
    data = birds_data(birds, Path(), folder / "cache", content="images")
    files = [LatentScale(), SavePipeline(str(folder))]
    quiet_trainer(folder, max_steps=2, callbacks=files).fit(module, datamodule=data)
    return folder / "pipeline"


@pytest.fixture(scope="module")
def trained(
    birds: Path, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, _Record]:
    folder = tmp_path_factory.mktemp("backbone")
    module = Backbone(str(start), warmup_steps=1, timestep_density="logit_normal")
    data = birds_data(birds, start, folder / "cache")
    record = _Record()
    watching = [record, SavePipeline(str(folder))]
    quiet_trainer(folder, max_steps=2, callbacks=watching).fit(module, datamodule=data)
    return folder / "pipeline", record


def test_latents_are_scaled_to_unit_deviation(birds: Path, start: Path, tmp_path: Path) -> None:
    data = birds_data(birds, start, tmp_path, content="images")
    images = data.images("train").gather(torch.arange(64)).float() / 127.5 - 1
    vae = load_pipeline(str(start)).vae
    with torch.no_grad():
        latents = vae.encode(images).latent * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1.0, abs=0.1)


def test_the_stock_pipeline_loads_the_trained_folder(
    start: Path, trained: tuple[Path, _Record]
) -> None:
    stock = SanaPipeline.from_pretrained(trained[0])
    stock.set_progress_bar_config(disable=True)
    image = stock(
        "a photo of a mallard",
        num_inference_steps=2,
        height=32,
        width=32,
        use_resolution_binning=False,
    ).images[0]
    assert image.size == (32, 32)
    before = load_pipeline(str(start)).transformer.state_dict()
    after = stock.transformer.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[name], value) for name, value in before.items())


@torch.no_grad()
def test_the_loss_is_that_of_flow_matching_on_the_same_draws(
    birds: Path, start: Path, trained: tuple[Path, _Record], tmp_path: Path
) -> None:
    """``|v - (eps - x)|^2`` at ``(1 - sigma) x + sigma eps``, prompts padded as by the pipeline."""
    batch, found = trained[1].seen[0]
    pipe, source = load_pipeline(str(start)), generator(0, "backbone", 0)
    count = len(batch["draw"])
    sigmas = (logit_normal_timesteps(count, 1000, source) + 1) / 1000
    noise = torch.randn((2, count, 4, 16, 16), generator=source)[1]
    dropped = torch.rand(count, generator=source) < 0.1
    latents = batch["moments"].float().chunk(2, dim=1)[0] * pipe.vae.config.scaling_factor
    names = birds_data(birds, start, tmp_path).prompts
    losses = []
    for row, draw in enumerate(batch["draw"].tolist()):
        text = "" if dropped[draw] else names[int(batch["prompt"][row])]
        embeds, mask, nothing, nothing_mask = pipe.encode_prompt(
            text or names[0], complex_human_instruction=_instruction(), clean_caption=False
        )
        sigma, eps, x = sigmas[draw], noise[draw : draw + 1], latents[row : row + 1]
        velocity = pipe.transformer(
            (1 - sigma) * x + sigma * eps,
            encoder_hidden_states=embeds if text else nothing,
            encoder_attention_mask=mask if text else nothing_mask,
            timestep=1000 * sigma.reshape(1),
        ).sample
        losses.append((velocity - (eps - x)).square().mean())
    assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def _instruction() -> list[str]:
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
    words: list[str] = default.default
    return words


def test_the_estimate_counts_the_operations_of_a_transformer_that_is_trained_whole(
    birds: Path, start: Path, tmp_path: Path
) -> None:
    estimate = ResourceEstimate()
    data = birds_data(birds, start, tmp_path / "cache")
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[estimate])
    module = Backbone(str(start), warmup_steps=1)
    trainer.fit(module, datamodule=data)
    condition = module.conditions[:1]
    transformer = load_pipeline(str(start)).transformer.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        transformer(
            torch.zeros(1, 4, 16, 16),
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=torch.ones(1),
        ).sample.square().mean().backward()
    assert estimate.operations == data.batch_size * counter.get_total_flops() > 0


def test_a_density_that_is_not_known_is_named(start: Path) -> None:
    with pytest.raises(InvDiffError, match="timestep_density=cosine: expected one of power"):
        Backbone(str(start), timestep_density="cosine")


def test_low_rank_updates_of_a_transformer_are_added_to_its_weights(
    birds: Path, start: Path, tmp_path: Path
) -> None:
    module = Backbone(str(start), warmup_steps=1, lora_rank=2)
    data = birds_data(birds, start, tmp_path / "cache")
    save = SavePipeline(str(tmp_path))
    quiet_trainer(tmp_path, max_steps=2, callbacks=[save]).fit(module, datamodule=data)
    before = load_pipeline(str(start)).transformer.state_dict()
    after = SanaPipeline.from_pretrained(tmp_path / "pipeline").transformer.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed
    assert all(".attn" in name for name in changed)
