"""Phase 0: fitting the denoiser of a pipeline to the biased data."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.diffusion.draws import generator, sample_timesteps
from invdiff_pl.diffusion.noising import ForwardProcess, sample_losses, sample_posterior
from invdiff_pl.diffusion.pipeline import load_pipeline, save_pipeline
from invdiff_pl.files import atomic_path
from invdiff_pl.modules.common import (
    check_finite,
    data_module,
    optimizer_with_schedule,
    output_folder,
    require_step_limit,
    share_of_mean,
)


class Backbone(pl.LightningModule):
    """Trains the UNet of a pipeline folder and writes the whole pipeline.

    The folder may be Stable Diffusion's, to be fine-tuned, or the autoencoder stage's, whose UNet
    starts from random weights.

    Args:
        backbone: the pipeline to start from: folder or hub id.
        output: folder; the pipeline is written to its ``pipeline`` folder.
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        warmup_steps: of the rate.
        conditioning_dropout: share of prompts replaced by the empty one, so that
            classifier-free guidance works.
        high_noise_exponent: the timestep density, see ``sample_timesteps``; 1 is uniform.
        half_precision: write float16 weights.
        seed: of all draws.
    """

    embeddings: Tensor

    def __init__(
        self,
        backbone: str,
        output: str,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 200,
        conditioning_dropout: float = 0.1,
        high_noise_exponent: float = 1.0,
        half_precision: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.output = output
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.conditioning_dropout = conditioning_dropout
        self.high_noise_exponent = high_noise_exponent
        self.half_precision = half_precision
        self.seed = seed
        self.pipeline = load_pipeline(backbone)
        self.unet = self.pipeline.unet.requires_grad_(True).train()
        self.process = ForwardProcess(self.pipeline.scheduler.config)

    def setup(self, stage: str) -> None:
        """Fetch the prompt embeddings."""
        self.register_buffer("embeddings", data_module(self).prompt_embeddings(), persistent=False)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, and averaged by the EMA callback."""
        return dict(self.unet.named_parameters())

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """Mean denoising loss of a batch."""
        source = generator(self.seed, "backbone", self.global_step)
        moments, draw = batch["moments"], batch["draw"]
        # Drawn for the whole global batch, so that the ranks' shares do not change the numbers.
        draws = data_module(self).batch_size
        shape = (draws, moments.shape[1] // 2, *moments.shape[2:])
        timesteps = sample_timesteps(
            draws, self.process.train_timesteps, self.high_noise_exponent, source
        ).to(self.device)[draw]
        noises = torch.randn((2, *shape), generator=source).to(self.device)[:, draw]
        dropped = torch.rand(draws, generator=source).to(self.device) < self.conditioning_dropout
        prompts = batch["prompt"].masked_fill(dropped[draw], len(self.embeddings) - 1)

        scaling = self.pipeline.vae.config.scaling_factor
        latents = sample_posterior(moments, noises[0], scaling)
        noisy = self.process.add_noise(latents, noises[1], timesteps)
        prediction = self.unet(noisy, timesteps, self.embeddings[prompts], return_dict=False)[0]
        losses = sample_losses(prediction, self.process.target(latents, noises[1], timesteps))
        loss = share_of_mean(losses, self)
        check_finite(loss, self)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine."""
        require_step_limit(self)
        parameters = list(self.unet.parameters())
        return optimizer_with_schedule(
            self, parameters, self.learning_rate, self.weight_decay, self.warmup_steps
        )

    def on_fit_end(self) -> None:
        """Write the pipeline, with the averaged weights if an EMA callback put them in place."""
        if not self.trainer.is_global_zero:
            return
        dtype = torch.float16 if self.half_precision else torch.float32
        with atomic_path(output_folder(self.output) / "pipeline") as partial:
            save_pipeline(self.pipeline.to(dtype), partial)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the UNet: VAE and text encoder are frozen and lie in the starting folder."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v for n, v in state.items() if n.startswith("unet.")}
