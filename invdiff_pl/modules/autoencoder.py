"""Training the autoencoder of a new small backbone."""

import pytorch_lightning as pl
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from invdiff_pl.backbones.architecture import Architecture, new_pipeline
from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.pipeline import save_pipeline
from invdiff_pl.data.datasets import LabelledBatch
from invdiff_pl.data.images import to_float
from invdiff_pl.modules.common import (
    check_finite,
    data_module,
    optimizer_with_schedule,
    output_folder,
    require_step_limit,
    share_of_mean,
)
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path


class Autoencoder(pl.LightningModule):
    """Trains a new pipeline's autoencoder; denoiser and text encoder stay at random weights.

    Args:
        output: folder; the pipeline is written to its ``pipeline`` folder.
        architecture: sizes of the new pipeline.
        learning_rate: peak rate of AdamW.
        kl_weight: weight of the KL divergence to the standard normal, summed over a latent,
            against the mean absolute and squared error of a pixel; a family whose autoencoder has
            no posterior has no divergence.
        seed: of weights and posterior draws.
    """

    def __init__(
        self,
        output: str,
        architecture: Architecture | None = None,
        learning_rate: float = 3e-3,
        kl_weight: float = 2e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["architecture"])
        self.output = output
        self.architecture = architecture or Architecture()
        self.learning_rate = learning_rate
        self.kl_weight = kl_weight
        self.seed = seed

    def configure_model(self) -> None:
        """Build the pipeline once the prompts are known."""
        if hasattr(self, "vae"):
            return
        data = data_module(self)
        if data.resolution != self.architecture.resolution:
            raise InvDiffError(
                f"resolution={data.resolution} of the data and architecture.resolution="
                f"{self.architecture.resolution} differ: give both the same value.",
                "resolution",
                "architecture.resolution",
            )
        self.pipeline = new_pipeline(self.architecture, data.prompts, self.seed)
        self.vae = self.pipeline.vae

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Reconstruction error plus KL divergence."""
        images = to_float(batch["images"])
        posterior = self._posterior(images)
        source = generator(self.seed, "posterior", self.global_step)
        # Drawn for the whole global batch, so that the ranks' shares do not change the numbers.
        shape = (data_module(self).batch_size, *posterior.mean.shape[1:])
        noise = torch.randn(shape, generator=source).to(images.device)[batch["draw"]]
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded - images).flatten(1)
        reconstruction = share_of_mean(error.abs().mean(1) + error.square().mean(1), self)
        divergence = share_of_mean(posterior.kl(), self)
        loss = reconstruction + self.kl_weight * divergence
        check_finite(loss, self)
        self.log("train/reconstruction", reconstruction, prog_bar=True)
        self.log("train/kl", divergence)
        return loss

    def _posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        encoded = self.vae.encode(images)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist
        return DiagonalGaussianDistribution(encoded.latent.repeat(1, 2, 1, 1), deterministic=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine."""
        require_step_limit(self)
        parameters = list(self.vae.parameters())
        return optimizer_with_schedule(self, parameters, self.learning_rate, 0.0, 100)

    @torch.no_grad()
    def on_fit_end(self) -> None:
        """Measure the latents' scale and write the pipeline."""
        if not self.trainer.is_global_zero:
            return
        data = data_module(self)
        images = data.images("train")
        some = images.gather(torch.arange(min(len(images), 1024))).to(self.device)
        self.vae.eval()
        latents = self._posterior(to_float(some)).mean
        self.vae.register_to_config(scaling_factor=float(1 / latents.std()))
        with atomic_path(output_folder(self.output) / "pipeline") as partial:
            save_pipeline(self.pipeline, partial)
