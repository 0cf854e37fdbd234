"""Training the autoencoder of a new small backbone."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from invdiff_pl.backbones.architecture import Architecture
from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.new_pipeline import new_pipeline
from invdiff_pl.data.images import to_float
from invdiff_pl.data.training import Labels
from invdiff_pl.modules.batches import shared_draws
from invdiff_pl.modules.common import (
    check_finite,
    optimizer_with_schedule,
    require_step_limit,
    share_of_mean,
)
from invdiff_pl.utils.errors import InvDiffError


class Autoencoder(pl.LightningModule):
    """Trains a new pipeline's autoencoder; the denoiser and text encoder keep random weights.

    Any loader will do whose batches hold ``images``, uint8 ``[B, 3, H, W]``.
    :class:`~invdiff_pl.callbacks.LatentScale` measures the latents' scale, and
    :class:`~invdiff_pl.callbacks.SavePipeline` writes the pipeline.

    Args:
        prompts: prompts whose words the text encoder will know, if no DataModule sets them.
        architecture: sizes of the new pipeline; the defaults if not given.
        learning_rate: peak rate of AdamW.
        kl_weight: weight of the KL divergence to the standard normal, summed over a latent,
            relative to the mean absolute and squared error per pixel; in a family whose autoencoder
            has no posterior, there is no divergence.
        seed: seed of the weights and of the posterior draws.
    """

    stage = "autoencoder"

    def __init__(
        self,
        prompts: Sequence[str] = (),
        architecture: Architecture | None = None,
        learning_rate: float = 3e-3,
        kl_weight: float = 2e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["architecture"])
        self.labels = Labels(tuple(prompts))
        self.architecture = architecture or Architecture()
        self.learning_rate = learning_rate
        self.kl_weight = kl_weight
        self.seed = seed

    def use_labels(self, labels: Labels) -> None:
        """Set the prompts."""
        self.labels = labels

    def configure_model(self) -> None:
        """Build the pipeline once the prompts are known."""
        if not hasattr(self, "vae"):
            self.pipeline = new_pipeline(self.architecture, self.labels.prompts, self.seed)
            self.vae = self.pipeline.vae

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Reject images of another size.

        Raises:
            ValueError: naming both sizes.
        """
        side = batch["images"].shape[-1]
        if side != self.architecture.resolution:
            raise InvDiffError(
                f"resolution={side} of the data and architecture.resolution="
                f"{self.architecture.resolution} differ: give both the same value.",
                "resolution",
                "architecture.resolution",
            )

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the reconstruction error plus the weighted KL divergence."""
        images = to_float(batch["images"])
        posterior = self.posterior(images)
        source = generator(self.seed, "posterior", self.global_step)
        # Drawn for the whole global batch, so that the ranks' shares do not change the numbers.
        draw, draws = shared_draws(batch, batch_idx, self)
        shape = (draws, *posterior.mean.shape[1:])
        noise = torch.randn(shape, generator=source).to(images.device)[draw]
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded - images).flatten(1)
        errors = error.abs().mean(1) + error.square().mean(1)
        reconstruction = share_of_mean(errors, draws, self)
        divergence = share_of_mean(posterior.kl(), draws, self)
        loss = reconstruction + self.kl_weight * divergence
        check_finite(loss, self)
        self.log("train/reconstruction", reconstruction, prog_bar=True)
        self.log("train/kl", divergence)
        return loss

    def posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        """Encode images ``[B, 3, H, W]`` in [-1, 1]; some families' posteriors have no width."""
        encoded = self.vae.encode(images)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist
        return DiagonalGaussianDistribution(encoded.latent.repeat(1, 2, 1, 1), deterministic=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW with warm-up and cosine decay."""
        require_step_limit(self)
        parameters = list(self.vae.parameters())
        return optimizer_with_schedule(self, parameters, self.learning_rate, 0.0, 100)

    def result(self) -> DiffusionPipeline:
        """Return the pipeline with the trained autoencoder."""
        return self.pipeline
