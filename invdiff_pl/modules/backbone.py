"""Phase 0: fitting the denoiser of a pipeline to the biased data."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from invdiff_pl.adapters import LoraAdapter
from invdiff_pl.backbones.draws import generator, logit_normal_timesteps, sample_timesteps
from invdiff_pl.backbones.noising import sample_losses
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.modules.batches import completed, step_draws
from invdiff_pl.modules.common import (
    OnPipeline,
    check_finite,
    hold_frozen,
    optimizer_with_schedule,
    require_step_limit,
    share_of_mean,
)
from invdiff_pl.utils.names import BACKBONE_DENSITIES, OPTIMIZERS, require_name


class Backbone(OnPipeline):
    """Trains the denoiser of a pipeline on latents and prompts.

    The pipeline may be one of any supported family, to be fine-tuned, or that of the autoencoder
    stage, whose denoiser starts from random weights. With ``lora_rank``, low-rank updates are
    trained, and added to the weights at the end: either way, :meth:`result` returns an ordinary
    pipeline, which :class:`~invdiff_pl.callbacks.SavePipeline` writes.

    Any loader will do whose batches hold ``latents`` ``[B, C, h, w]`` (or the VAE posterior's
    ``moments`` ``[B, 2C, h, w]``) and ``prompt`` (texts, or numbers into ``prompts``).

    Args:
        backbone: a loaded pipeline, or a pipeline folder, hub id or ``asset:NAME``.
        prompts: prompts that numbers in batches stand for, if no DataModule sets them.
        learning_rate: peak rate of AdamW.
        weight_decay: weight decay of AdamW.
        warmup_steps: number of steps over which the rate is warmed up.
        conditioning_dropout: share of prompts replaced by the empty one, so that
            classifier-free guidance works.
        timestep_density: ``power``, see ``sample_timesteps``; or ``logit_normal``, with which large
            flow-matching transformers are trained, see ``logit_normal_timesteps``. With the latter,
            small transformers learn little where there is almost no signal, which is where
            backgrounds are decided.
        high_noise_exponent: exponent of ``power``; 1 is uniform.
        lora_rank: rank of the updates (see ``invdiff_pl.adapters.LoraAdapter``); every weight is
            trained if not given.
        gradient_checkpointing: recompute activations, which takes less memory and more time.
        optimizer: ``adamw``, or ``adamw8bit``, whose moments take one byte each.
        seed: seed of all draws.

    Raises:
        ValueError: if the backbone cannot be loaded.

    Example:
        >>> import pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> rows = [{"latents": torch.randn(4, 16, 16), "prompt": "a nurse"} for _ in range(8)]
        >>> module = Backbone(tiny_pipeline(["a nurse"]), lora_rank=2)
        >>> trainer = pl.Trainer(
        ...     max_steps=2,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_model_summary=False,
        ...     enable_progress_bar=False,
        ... )
        >>> trainer.fit(module, DataLoader(rows, batch_size=4))
        >>> type(module.result()).__name__
        'StableDiffusionPipeline'
    """

    stage = "backbone"

    def __init__(
        self,
        backbone: str | DiffusionPipeline,
        prompts: Sequence[str] = (),
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 200,
        conditioning_dropout: float = 0.1,
        timestep_density: str = "power",
        high_noise_exponent: float = 1.0,
        lora_rank: int | None = None,
        gradient_checkpointing: bool = False,
        optimizer: str = "adamw",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(backbone, str) else ["backbone"])
        self.strict_loading = False
        self.backbone = backbone
        self.attach(backbone, prompts)
        self.denoiser = self.frozen.network
        self.lora: LoraAdapter | None = None
        if lora_rank is None:
            self.denoiser.requires_grad_(True).train()
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.lora = LoraAdapter(self.denoiser, rank=lora_rank)
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.process = self.frozen.process
        require_name("timestep_density", timestep_density, BACKBONE_DENSITIES)
        require_name("optimizer", optimizer, OPTIMIZERS)

    def setup(self, stage: str) -> None:
        """Make frozen parts cheap to hold."""
        super().setup(stage)
        if self.owns_backbone:
            hold_frozen(self, *self.frozen.other_networks)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that are trained, and averaged by the EMA callback."""
        if self.lora is not None:
            return self.lora.parameters()
        return dict(self.denoiser.named_parameters())

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the mean denoising loss of a batch."""
        whole = completed(batch, batch_idx, self)
        chosen: Any = self.hparams
        source = generator(chosen.seed, "backbone", self.global_step)
        timesteps, (posterior_noise, noise), prompts = step_draws(
            whole, self._timesteps, source, self, chosen.conditioning_dropout
        )
        latents = self.latents_of(whole, posterior_noise)
        noisy = self.process.add_noise(latents, noise, timesteps)
        prediction = self.frozen.predict(noisy, timesteps, self.conditions[prompts], self.denoiser)
        losses = sample_losses(prediction, self.process.target(latents, noise, timesteps))
        loss = share_of_mean(losses, whole["draw_count"], self)
        check_finite(loss, self)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _timesteps(self, count: int, source: torch.Generator) -> Tensor:
        chosen, every = self.hparams, self.process.train_timesteps
        if chosen["timestep_density"] == "logit_normal":
            return logit_normal_timesteps(count, every, source)
        return sample_timesteps(count, every, chosen["high_noise_exponent"], source)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW with warm-up and cosine decay."""
        require_step_limit(self)
        parameters, chosen = list(self.trainable_parameters().values()), self.hparams
        names = ("learning_rate", "weight_decay", "warmup_steps", "optimizer")
        return optimizer_with_schedule(self, parameters, *(chosen[name] for name in names))

    @torch.no_grad()
    def result(self) -> DiffusionPipeline:
        """Return the pipeline with the trained weights, averaged if a callback put those in place.

        A pipeline that was loaded here is loaded again, as its parts may have been rounded; one
        that was handed in is changed in place.
        """
        updates = {} if self.lora is None else self.lora.updates()
        if isinstance(self.backbone, str):
            pipeline = load_pipeline(self.backbone)
        else:
            pipeline = self.backbone
            if self.lora is not None:
                self.lora.detach()
        if self.lora is None:
            setattr(pipeline, self.frozen.part, self.denoiser)
        weights = getattr(pipeline, self.frozen.part).state_dict()
        for name, update in updates.items():
            weights[name] += update.to(weights[name])
        return pipeline

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights only; the frozen ones are in the initial pipeline."""
        kept = {f"denoiser.{name}" for name in self.trainable_parameters()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v for n, v in state.items() if n in kept}
