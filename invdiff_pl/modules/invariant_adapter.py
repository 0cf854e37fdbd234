"""Phase 2: the adapter, trained to lower mean and spread of the environments' risks."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from invdiff_pl.adapters import Adapter, build_adapter
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.diffusion.draws import generator, sample_timesteps
from invdiff_pl.diffusion.noising import ForwardProcess, sample_losses, sample_posterior
from invdiff_pl.diffusion.pipeline import load_pipeline
from invdiff_pl.files import atomic_path
from invdiff_pl.modules.common import (
    check_finite,
    data_module,
    optimizer_with_schedule,
    output_folder,
    require_step_limit,
)
from invdiff_pl.objectives import Objective, invariant_objective


class InvariantAdapter(pl.LightningModule):
    """Trains ``G_psi`` beside the frozen backbone on ``mean_g L_g + lambda Var_g L_g``.

    The DataModule's batches are balanced over (prompt, environment), and the images of a pair
    share timestep and noise. Checkpoints hold the adapter only.

    Args:
        backbone: pipeline folder, hub id or ``asset:NAME``.
        output: folder; the adapter is written to its ``adapter`` folder.
        adapter: kind of adapter, see ``invdiff_pl.adapters``.
        adapter_settings: of that kind.
        lambda_: weight of the variance penalty.
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        warmup_steps: of the rate.
        conditioning_dropout: share of pairs whose prompt is replaced by the empty one, so that
            classifier-free guidance keeps working.
        high_noise_exponent: the timestep density, see ``sample_timesteps``; 1 is uniform.
        seed: of the adapter's weights and of all draws.
    """

    embeddings: Tensor

    def __init__(
        self,
        backbone: str,
        output: str,
        adapter: str = "lora",
        adapter_settings: dict[str, Any] | None = None,
        lambda_: float = 1.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 20,
        conditioning_dropout: float = 0.1,
        high_noise_exponent: float = 1 / 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.strict_loading = False
        self.output = output
        self.lambda_ = lambda_
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.conditioning_dropout = conditioning_dropout
        self.high_noise_exponent = high_noise_exponent
        self.seed = seed
        self.pipeline = load_pipeline(backbone)
        self.process = ForwardProcess(self.pipeline.scheduler.config)
        self.backbone_size = sum(value.numel() for value in self.pipeline.unet.parameters())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.adapter: Adapter = build_adapter(
                adapter, self.pipeline.unet, **(adapter_settings or {})
            )
        # Registered so that Lightning moves the weights to the device.
        self.denoiser = self.adapter.denoiser

    def setup(self, stage: str) -> None:
        """Fetch the prompt embeddings and the environments' number."""
        data = data_module(self)
        self.register_buffer("embeddings", data.prompt_embeddings(), persistent=False)
        self.groups = data.groups
        self.draws = data.draws

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, and averaged by the EMA callback."""
        return self.adapter.parameters()

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """The invariant objective on one batch."""
        losses = self._losses(batch)
        weights = nn.functional.one_hot(batch["environment"], self.groups).float()
        objective = invariant_objective(
            losses,
            weights,
            self.lambda_,
            reduce=lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"),
            world_size=self.trainer.world_size,
        )
        risks = enumerate(objective.risks)
        check_finite(
            objective.loss, self, {str(n): risk for n, risk in risks if weights[:, n].any()}
        )
        self._log(objective)
        return objective.loss

    def _losses(self, batch: LatentBatch) -> Tensor:
        """Per-sample losses ``[B]``; rows with the same draw share timestep, noise and dropout."""
        source = generator(self.seed, "adapter", self.global_step)
        moments, draw = batch["moments"], batch["draw"]
        # Drawn for the whole global batch, so that the ranks' shares do not change the numbers.
        draws = self.draws
        shape = (draws, moments.shape[1] // 2, *moments.shape[2:])
        timesteps = sample_timesteps(
            draws, self.process.train_timesteps, self.high_noise_exponent, source
        ).to(self.device)[draw]
        noise, posterior_noise = torch.randn((2, *shape), generator=source).to(self.device)[:, draw]
        dropped = torch.rand(draws, generator=source) < self.conditioning_dropout
        null = len(self.embeddings) - 1
        prompts = batch["prompt"].masked_fill(dropped.to(self.device)[draw], null)

        scaling = self.pipeline.vae.config.scaling_factor
        latents = sample_posterior(moments, posterior_noise, scaling)
        noisy = self.process.add_noise(latents, noise, timesteps)
        prediction = self.adapter.predict(noisy, timesteps, self.embeddings[prompts])
        return sample_losses(prediction, self.process.target(latents, noise, timesteps))

    def _log(self, objective: Objective) -> None:
        self.log("train/mean_risk", objective.mean, prog_bar=True)
        self.log("train/risk_variance", objective.variance, prog_bar=True)
        for number, risk in enumerate(objective.risks):
            self.log(f"train/risk/environment_{number}", risk)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine, over the adapter alone."""
        require_step_limit(self)
        parameters = list(self.trainable_parameters().values())
        return optimizer_with_schedule(
            self, parameters, self.learning_rate, self.weight_decay, self.warmup_steps
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen backbone out of checkpoints."""
        trained = {id(parameter) for parameter in self.trainable_parameters().values()}
        names = {name for name, value in self.named_parameters() if id(value) in trained}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in names}

    def on_fit_end(self) -> None:
        """Write the adapter, averaged if an EMA callback put the average in place."""
        if self.trainer.is_global_zero:
            with atomic_path(output_folder(self.output) / "adapter") as partial:
                partial.mkdir()
                self.adapter.save(partial, backbone_size=self.backbone_size)
