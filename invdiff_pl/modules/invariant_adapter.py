"""Phase 2: an adapter, trained to lower the mean and spread of the environments' risks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from invdiff_pl.adapters import Adapter, build_adapter
from invdiff_pl.adapters.base import require_adapter
from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.noising import sample_losses, timestep_at
from invdiff_pl.backbones.quantized import QUANTIZED
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.data.environments import Environments
from invdiff_pl.modules.anchoring import Draw, anchored
from invdiff_pl.modules.batches import completed, micro_batches, step_draws
from invdiff_pl.modules.common import (
    OnPipeline,
    check_finite,
    hold_frozen,
    optimizer_with_schedule,
    require_step_limit,
    trained_state,
)
from invdiff_pl.objectives import (
    Objective,
    build_density,
    build_rule,
    group_objective,
    group_sums,
    min_snr_weights,
)
from invdiff_pl.objectives.densities import require_density
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import OPTIMIZERS, WEIGHTINGS, require_name

UNTRAINED = (
    "{why}, so the adapter is left untrained, a no-op; train_without_bias=true trains it "
    "all the same"
)


class InvariantAdapter(OnPipeline):
    """Trains ``G_psi`` beside the frozen backbone on an objective of the environments' risks.

    By default the objective is ``mean_g L_g + lambda Var_g L_g``. Any loader will do whose batches
    hold ``latents`` ``[B, C, h, w]`` (or the VAE posterior's ``moments`` ``[B, 2C, h, w]``),
    ``prompt`` (texts, or numbers into ``prompts``) and ``environment`` int64 ``[B]`` (or soft
    ``membership`` ``[B, G]``). Batches of :class:`~invdiff_pl.data.training.LatentDataModule` are
    balanced over (prompt, environment), and rows with the same ``draw`` share timestep and noise.
    The module writes no files; :class:`~invdiff_pl.callbacks.SaveAdapter` does that. Checkpoints
    hold the adapter only. If the inference found no bias, or could not test for one, nothing is
    trained.

    Args:
        backbone: a loaded pipeline, whose denoiser the adapter is attached to; or a pipeline
            folder, hub id or ``asset:NAME``.
        adapter: kind of adapter, see ``invdiff_pl.adapters``.
        adapter_settings: settings of that kind.
        objective: how the group risks are combined, see ``invdiff_pl.objectives.build_rule``.
        objective_settings: settings of that objective.
        lambda_: weight of the variance penalty, if the objective has one.
        groups: G, the number of environments, if no DataModule sets it.
        prompts: prompts that numbers in batches stand for, if no DataModule sets them.
        learning_rate: peak rate of AdamW.
        weight_decay: weight decay of AdamW.
        warmup_steps: number of steps over which the rate is warmed up.
        conditioning_dropout: share of draws whose prompt is replaced by the empty one, so that
            classifier-free guidance keeps working.
        timestep_density: ``uniform`` or ``high_noise``, see
            ``invdiff_pl.objectives.build_density``.
        high_noise_exponent: exponent of the ``high_noise`` density.
        anchored_from: logarithm of the signal-to-noise ratio from which on the adapter is trained
            towards the frozen prediction, for images that the model has drawn itself, see
            :mod:`invdiff_pl.modules.anchoring`; nowhere if not given.
        loss_weighting: ``none``, or ``min_snr``.
        min_snr_gamma: gamma of ``min_snr``.
        gradient_checkpointing: recompute activations, which takes less memory and more time.
        train_without_bias: train even if the inference found no bias or could not test for one.
        resolution: side of the images in pixels; the pipeline's own if not given.
        frozen_weights: how the weights of a backbone that is loaded here are held, see
            :func:`~invdiff_pl.backbones.pipeline.load_pipeline`.
        optimizer: ``adamw``, or ``adamw8bit``, whose moments take one byte each.
        seed: seed of the adapter's weights and of all draws.

    Raises:
        ValueError: if a setting is wrong, or the backbone cannot be loaded.

    Example:
        >>> import pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> rows = [
        ...     {"latents": torch.randn(4, 16, 16), "prompt": "a nurse", "environment": n % 2}
        ...     for n in range(8)
        ... ]
        >>> module = InvariantAdapter(tiny_pipeline(["a nurse"]), learning_rate=1e-4)
        >>> trainer = pl.Trainer(
        ...     max_steps=2,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_model_summary=False,
        ...     enable_progress_bar=False,
        ... )
        >>> trainer.fit(module, DataLoader(rows, batch_size=4))
        >>> for name in sorted(trainer.callback_metrics):
        ...     print(name)
        train/mean_risk
        train/risk/environment_0
        train/risk/environment_1
        train/risk_variance
    """

    stage = "adapter"

    def __init__(
        self,
        backbone: str | DiffusionPipeline,
        adapter: str = "lora",
        adapter_settings: dict[str, Any] | None = None,
        objective: str = "variance",
        objective_settings: dict[str, Any] | None = None,
        lambda_: float = 1.0,
        groups: int = 2,
        prompts: Sequence[str] = (),
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 20,
        conditioning_dropout: float = 0.1,
        timestep_density: str = "high_noise",
        high_noise_exponent: float = 1 / 3,
        anchored_from: float | None = None,
        loss_weighting: str = "none",
        min_snr_gamma: float = 5.0,
        gradient_checkpointing: bool = False,
        train_without_bias: bool = False,
        resolution: int | None = None,
        frozen_weights: str = "float32",
        optimizer: str = "adamw",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(backbone, str) else ["backbone"])
        self.require_settings(self.hparams)
        self.strict_loading = False
        self.conditioning_dropout = conditioning_dropout
        self.min_snr_gamma = min_snr_gamma if loss_weighting == "min_snr" else None
        self.seed = seed
        self.attach(backbone, prompts, resolution, frozen_weights)
        self.process = self.frozen.process
        self.anchored_before = (
            0 if anchored_from is None else timestep_at(self.process, anchored_from)
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.adapter: Adapter = build_adapter(
                adapter, self.frozen.network, **(adapter_settings or {})
            )
        self.adapter.prepare_training()
        if gradient_checkpointing:
            self.adapter.enable_gradient_checkpointing()
        # Registered, so that Lightning moves the weights to the device.
        self.denoiser = self.adapter.denoiser
        self.frozen.network = self.adapter.denoiser
        self.environments = Environments(torch.ones((0, groups)))

    def use_environments(self, environments: Environments) -> None:
        """Set the environments of the images that batches are drawn from."""
        self.environments = environments

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Check the settings before a network is loaded.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first setting that is wrong.
        """
        require_name("loss_weighting", settings["loss_weighting"], WEIGHTINGS)
        require_name("optimizer", settings["optimizer"], OPTIMIZERS)
        require_adapter(settings["adapter"], settings["adapter_settings"] or {})
        if settings["frozen_weights"] in QUANTIZED and settings["adapter"] != "lora":
            raise InvDiffError(
                f"frozen_weights={settings['frozen_weights']}: only a LoRA is trained beside "
                f"quantised weights, not adapter={settings['adapter']}.",
                "frozen_weights",
                "adapter",
            )
        build_rule(
            settings["objective"],
            groups=2,
            penalty=settings["lambda_"],
            **(settings["objective_settings"] or {}),
        )
        require_density(settings["timestep_density"], settings["high_noise_exponent"])

    def setup(self, stage: str) -> None:
        """Build what depends on the prompts and the environments."""
        chosen: Any = self.hparams
        super().setup(stage)
        if self.owns_backbone:
            # Callbacks draw pictures with the VAE and the text encoder.
            hold_frozen(self, *self.frozen.other_networks)
        inferred = self.environments
        self.rule = build_rule(
            chosen.objective, inferred.groups, chosen.lambda_, **(chosen.objective_settings or {})
        )
        self.density = build_density(
            chosen.timestep_density,
            self.process.train_timesteps,
            chosen.high_noise_exponent,
        )
        self.withheld = None if chosen.train_without_bias else inferred.withheld
        self._sums: tuple[int, Tensor | None] = (-1, None)

    @property
    def trains(self) -> bool:
        """Whether anything is trained; known once :meth:`setup` has run."""
        return self.withheld is None

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, and averaged by the EMA callback."""
        return self.adapter.parameters()

    def on_train_start(self) -> None:
        """Stop at once if there is no bias to mitigate."""
        if self.withheld is not None:
            rank_zero_only(print)(UNTRAINED.format(why=self.withheld))
            self.trainer.should_stop = True

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """Return the objective on a (micro-)batch, with the gradient implied by the whole batch."""
        micro_batches = self.trainer.accumulate_grad_batches
        sums = self._whole_batch_sums() if micro_batches > 1 else None
        whole = completed(batch, batch_idx, self, self.environments.groups)
        objective = self.objective(self._losses(whole), whole["membership"], sums)
        check_finite(objective.loss, self, {str(n): r for n, r in enumerate(objective.risks)})
        for name, value in self.figures().items():
            self.log(name, value, prog_bar=name == "train/mean_risk")
        return micro_batches * objective.loss  # Lightning divides by their number

    def objective(self, losses: Tensor, membership: Tensor, sums: Tensor | None) -> Objective:
        """Return the objective of losses ``[B]``, with the gradient implied by the whole batch."""
        objective = group_objective(
            losses,
            membership,
            self.rule,
            sums=sums,
            reduce=self.add_up,
            world_size=self.trainer.world_size,
        )
        self._latest = replace(objective, loss=objective.loss.detach())
        return objective

    def figures(self) -> dict[str, Tensor]:
        """Return the scalars of the latest step, by their names in logs."""
        latest = self._latest
        risks = latest.risks.masked_fill(latest.group_weights == 0, torch.nan)
        by_environment = {f"train/risk/environment_{n}": risk for n, risk in enumerate(risks)}
        return {
            "train/mean_risk": latest.mean,
            "train/risk_variance": latest.variance,
            **by_environment,
        }

    @torch.no_grad()
    def _whole_batch_sums(self) -> Tensor:
        """Sum over all ranks' micro-batches of this step, in a first pass without gradients."""
        step, sums = self._sums
        if step == self.global_step and sums is not None:
            return sums
        total = torch.zeros((2, self.environments.groups), device=self.device)
        for batch in micro_batches(self.trainer, self.global_step):
            here: LatentBatch = self.trainer.strategy.batch_to_device(batch)
            total = total + group_sums(self._losses(here), here["membership"])
        total = self.add_up(total)
        self._sums = self.global_step, total
        return total

    def add_up(self, sums: Tensor) -> Tensor:
        """Add up the sums of all ranks."""
        added: Tensor = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return added

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the objective with the whole batch's risks, once per step."""
        self.rule.observe(self._latest.risks, self._latest.group_weights)

    def _losses(self, batch: LatentBatch) -> Tensor:
        """Return the weighted per-sample losses ``[B]`` of a (micro-)batch of the current step."""
        draw = self.draw(batch)
        return self._draw_losses(draw) * self.loss_weights(draw.timesteps)

    def _draw_losses(self, draw: Draw) -> Tensor:
        prediction = self.frozen.predict(
            draw.noisy, draw.timesteps, draw.condition, self.adapter.denoiser
        )
        return sample_losses(prediction, draw.target)

    def draw(self, batch: LatentBatch) -> Draw:
        """Draw timesteps and noise for this step; rows with the same ``draw`` share them.

        They share the dropout of the prompt, too.
        """
        source = generator(self.seed, "adapter", self.global_step)
        timesteps, (noise, posterior_noise), prompts = step_draws(
            batch, self.density.sample, source, self, self.conditioning_dropout
        )
        latents = self.latents_of(batch, posterior_noise)
        draw = self._noised(latents, prompts, timesteps, noise)
        if not self.anchored_before:
            return draw
        return anchored(draw, self.frozen, self.adapter, self.anchored_before)

    def _noised(self, latents: Tensor, prompts: Tensor, timesteps: Tensor, noise: Tensor) -> Draw:
        noisy = self.process.add_noise(latents, noise, timesteps)
        target = self.process.target(latents, noise, timesteps)
        return Draw(noisy, timesteps, self.conditions[prompts], target)

    def denoising_losses(
        self,
        batch: LatentBatch,
        timesteps: Tensor,
        noise: Tensor,
        posterior_noise: Tensor | None = None,
    ) -> Tensor:
        """Return the per-sample losses of the adapted denoiser, before any weighting.

        Args:
            batch: a batch of B images.
            timesteps: int64 ``[B]``.
            noise: ``[B, C, H, W]``.
            posterior_noise: ``[B, C, H, W]``; the posterior's mean is taken if not given.

        Returns:
            float32 ``[B]``.
        """
        latents = self.latents_of(batch, posterior_noise)
        return self._draw_losses(self._noised(latents, batch["prompt"], timesteps, noise))

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """Return the weights in the objective of losses at timesteps ``[B]``."""
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        return min_snr_weights(self.process, timesteps, self.min_snr_gamma)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW with warm-up and cosine decay, for the adapter alone."""
        require_step_limit(self)
        chosen: Any = self.hparams
        return optimizer_with_schedule(
            self,
            list(self.trainable_parameters().values()),
            chosen.learning_rate,
            chosen.weight_decay,
            chosen.warmup_steps,
            chosen.optimizer,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen backbone out of checkpoints."""
        checkpoint["state_dict"] = trained_state(self, checkpoint["state_dict"])
