"""Phase 0: fitting the denoiser of a pipeline to the biased data."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from invdiff_pl.adapters import LoraAdapter
from invdiff_pl.backbones.draws import (
    generator,
    logit_normal_timesteps,
    on_device,
    sample_timesteps,
)
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.noising import sample_losses
from invdiff_pl.backbones.pipeline import load_pipeline, save_pipeline
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.modules.common import (
    check_finite,
    hold_frozen,
    optimizer_with_schedule,
    output_folder,
    require_step_limit,
    share_of_mean,
)
from invdiff_pl.utils.files import atomic_path
from invdiff_pl.utils.names import BACKBONE_DENSITIES, require_name


class Backbone(pl.LightningModule):
    """Trains the denoiser of a pipeline folder and writes the whole pipeline.

    The folder may be any supported family's, to be fine-tuned, or the autoencoder stage's, whose
    denoiser starts from random weights. With ``lora_rank`` low-rank updates are trained, and added
    to the weights in the end: the result is an ordinary pipeline folder either way.

    Args:
        backbone: the pipeline to start from: folder or hub id.
        output: folder; the pipeline is written to its ``pipeline`` folder.
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        warmup_steps: of the rate.
        conditioning_dropout: share of prompts replaced by the empty one, so that
            classifier-free guidance works.
        timestep_density: ``power``, see ``sample_timesteps``; or ``logit_normal``, as large
            flow-matching transformers are trained, see ``logit_normal_timesteps``. Small ones learn
            little of it where there is almost no signal, which decides about backgrounds.
        high_noise_exponent: of ``power``; 1 is uniform.
        lora_rank: of the updates (see ``invdiff_pl.adapters.LoraAdapter``); every weight is trained
            if not given.
        gradient_checkpointing: recompute activations, for less memory and more time.
        half_precision: write float16 weights.
        seed: of all draws.
    """

    conditions: Conditions

    def __init__(
        self,
        backbone: str,
        output: str,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 200,
        conditioning_dropout: float = 0.1,
        timestep_density: str = "power",
        high_noise_exponent: float = 1.0,
        lora_rank: int | None = None,
        gradient_checkpointing: bool = False,
        half_precision: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.strict_loading = False
        self.backbone = backbone
        self.output = output
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.conditioning_dropout = conditioning_dropout
        self.high_noise_exponent = high_noise_exponent
        self.half_precision = half_precision
        self.seed = seed
        self.pipeline = load_pipeline(backbone)
        self.frozen = frozen_denoiser(self.pipeline)
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
        self.timestep_density = timestep_density

    def use_prompts(self, conditions: Conditions) -> None:
        """Take what the prompts and, last, the empty one become."""
        self.conditions = conditions

    def setup(self, stage: str) -> None:
        """Make frozen parts cheap to hold."""
        hold_frozen(self, *self.frozen.other_networks)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, and averaged by the EMA callback."""
        if self.lora is not None:
            return self.lora.parameters()
        return dict(self.denoiser.named_parameters())

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """Mean denoising loss of a batch."""
        source = generator(self.seed, "backbone", self.global_step)
        moments, draw = batch["moments"], batch["draw"]
        # Drawn for the whole global batch, so that the ranks' shares do not change the numbers.
        draws = batch["draw_count"]
        shape = (draws, moments.shape[1] // 2, *moments.shape[2:])
        timesteps = on_device(self._timesteps(draws, source), self.device)[draw]
        noises = on_device(torch.randn((2, *shape), generator=source), self.device)[:, draw]
        dropped = torch.rand(draws, generator=source) < self.conditioning_dropout
        null = len(self.conditions) - 1
        prompts = batch["prompt"].masked_fill(on_device(dropped, self.device)[draw], null)

        latents = self.frozen.latents(moments, noises[0])
        noisy = self.process.add_noise(latents, noises[1], timesteps)
        prediction = self.frozen.predict(noisy, timesteps, self.conditions[prompts], self.denoiser)
        losses = sample_losses(prediction, self.process.target(latents, noises[1], timesteps))
        loss = share_of_mean(losses, self)
        check_finite(loss, self)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _timesteps(self, count: int, source: torch.Generator) -> Tensor:
        every = self.process.train_timesteps
        if self.timestep_density == "logit_normal":
            return logit_normal_timesteps(count, every, source)
        return sample_timesteps(count, every, self.high_noise_exponent, source)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine."""
        require_step_limit(self)
        parameters = list(self.trainable_parameters().values())
        return optimizer_with_schedule(
            self, parameters, self.learning_rate, self.weight_decay, self.warmup_steps
        )

    def on_fit_end(self) -> None:
        """Write the pipeline, with the averaged weights if an EMA callback put them in place."""
        if not self.trainer.is_global_zero:
            return
        dtype = torch.float16 if self.half_precision else torch.float32
        with atomic_path(output_folder(self.output) / "pipeline") as partial:
            save_pipeline(self._result().to(dtype), partial)

    @torch.no_grad()
    def _result(self) -> Any:
        """The pipeline with what was learned; the parts held here may be rounded."""
        pipeline = load_pipeline(self.backbone)
        if self.lora is None:
            setattr(pipeline, self.frozen.part, self.denoiser)
        else:
            weights = getattr(pipeline, self.frozen.part).state_dict()
            for name, update in self.lora.updates().items():
                weights[name] += update.to(weights[name].device)
        return pipeline

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained; what is frozen lies in the starting folder."""
        kept = {f"denoiser.{name}" for name in self.trainable_parameters()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v for n, v in state.items() if n in kept}
