"""Selection of the weights that become the result, by held-out risks, never by labels."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.callbacks.ema import ExponentialMovingAverage
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.data.training import training_data
from invdiff_pl.modules.common import stage_name
from invdiff_pl.modules.invariant_adapter import InvariantAdapter
from invdiff_pl.objectives.heldout import (
    HeldOutObjective,
    bin_figures,
    held_out_weights,
    round_robin,
    timestep_bins,
)
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import write_json
from invdiff_pl.utils.progress import track

CRITERION = (
    "the objective of the held-out group risks in each timestep bin, averaged over bins in "
    "proportion to their draws in training; the last step within one standard error of the lowest"
)
NOTHING_HELD_OUT = (
    "no images are held out: held_out=0, or every environment is too small for it; the "
    "last weights are the result"
)


class HeldOutSelection(pl.Callback):
    """Measures group risks on images that training never sees, and keeps the best weights.

    Noises and timesteps are the same in every measurement, so that differences are due to the
    adapter, and the same for the first image of every (prompt, environment), for the second of
    every one, and so on, so that environments are compared at equal draws.

    Among the weights whose held-out objective is within one standard error of the lowest, the last
    become the result: training is meant to run to its end, and an earlier step, or the untrained
    adapter of step 0, must be better by more than noise. If an average of the weights is kept, the
    average is measured. ``report`` holds, per timestep bin, the mean and the worst group risk and
    the bound of METHOD, before and after. Labels are not read.

    Args:
        every_n_steps: number of steps between measurements; one is taken before training and one at
            its end.
        images: maximum number of images, dealt over (prompt, environment) in turn.
        bins: number of timestep bins, of equal width.
        batch_size: number of images measured together on a rank.
        output: folder that ``heldout.json`` is written to; nothing is written if not given.
        seed: seed of the noises.
    """

    changes_result = True

    def __init__(
        self,
        every_n_steps: int = 100,
        images: int = 192,
        bins: int = 10,
        batch_size: int = 64,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.images = images
        self.bins = bins
        self.batch_size = batch_size
        self.output = output
        # What was measured, once training has ended.
        self.report: dict[str, Any] = {}
        self.seed = seed
        self._candidates: list[dict[str, Any]] = []
        # Losses [n, bins] before training, at the lowest objective, and of the weights kept.
        self._losses: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reject a position before the averaging callback, which would undo the choice."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        later = callbacks[callbacks.index(self) :]
        if any(isinstance(callback, ExponentialMovingAverage) for callback in later):
            raise InvDiffError(
                "`trainer.callbacks`: HeldOutSelection must come after ExponentialMovingAverage.",
                "trainer.callbacks",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the images, and measure the backbone."""
        assert isinstance(pl_module, InvariantAdapter)
        if self._prepare(trainer, pl_module) and not self._candidates:
            self._measure(trainer, pl_module)

    def _prepare(self, trainer: pl.Trainer, module: InvariantAdapter) -> bool:
        """Choose images and timesteps, and return whether there are any images."""
        data = training_data(trainer)
        inferred, held = data.inferred(), data.held_out().nonzero().squeeze(1)
        prompts = data.train_prompts()
        self.rows, places = round_robin(prompts, inferred.assignments, held, self.images)
        if not len(self.rows):
            return False
        own = prompts[self.rows]
        self._places = places
        self._edges, timesteps = timestep_bins(
            self.bins, module.process.train_timesteps, int(places.max()) + 1
        )
        self._timesteps = timesteps[places]
        edges = self._edges.tolist()
        shares = [module.density.mass(*ends) for ends in pairwise(edges)]
        self._objective = HeldOutObjective(
            held_out_weights(own, inferred.memberships[self.rows]),
            own * inferred.groups + inferred.assignments[self.rows],
            torch.tensor(shares, dtype=torch.float64),
            module.rule,
        )
        return True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        """Measure every ``every_n_steps`` optimizer steps and after the last."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, InvariantAdapter)
        step = trainer.global_step
        if not len(self.rows) or any(c["step"] == step for c in self._candidates):
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averages = [c for c in callbacks if isinstance(c, ExponentialMovingAverage)]
        for average in averages:
            average.swap(pl_module)
        try:
            value = self._consider(step, self._measured_losses(trainer, pl_module), pl_module)
        finally:
            for average in averages:
                average.restore(pl_module)
        for logger in trainer.loggers:
            logger.log_metrics({"heldout/objective": value}, step)

    def _consider(self, step: int, losses: Tensor, module: InvariantAdapter) -> float:
        """Add a candidate, and keep its weights if it is the one to choose so far."""
        weights = module.loss_weights(self._timesteps.to(module.device)).double().cpu()
        binned = losses * weights
        value = self._objective.value(binned)
        lowest = min((c["value"] for c in self._candidates), default=torch.inf)
        if value < lowest:
            error = 0.0
            self._losses["lowest"] = binned
        else:
            error = self._objective.standard_error(binned, self._losses["lowest"])
        self._candidates.append({"step": step, "value": value, "standard_error": error})
        self._losses.setdefault("before", losses)
        if value <= lowest + error:
            self._chosen_step = step
            self._losses["after"] = losses
            self._kept = {
                name: parameter.detach().cpu().clone()
                for name, parameter in module.trainable_parameters().items()
            }
        return value

    @torch.no_grad()
    def _measured_losses(self, trainer: pl.Trainer, module: InvariantAdapter) -> Tensor:
        """Return the losses of all images with the current weights, float64 ``[n, bins]``."""
        data = training_data(trainer)
        losses = torch.zeros(self._timesteps.shape, device=module.device)
        own = torch.arange(trainer.global_rank, len(self.rows), trainer.world_size)
        with trainer.precision_plugin.val_step_context(), module.adapter.folded():
            what = f"{stage_name(module)}, held-out losses"
            for mine in track(own.split(self.batch_size), what, unit="batch", bar=False):
                batch = trainer.strategy.batch_to_device(data.training_latents(self.rows[mine]))
                for column in range(self.bins):
                    losses[mine, column] = self._losses_in_bin(module, batch, mine, column)
        gathered: Tensor = trainer.strategy.reduce(losses, reduce_op="sum")
        return gathered.double().cpu()

    def _losses_in_bin(
        self, module: InvariantAdapter, batch: LatentBatch, mine: Tensor, column: int
    ) -> Tensor:
        _, channels, *size = batch["moments"].shape
        source = generator(self.seed, "held-out noise", column)
        noises = torch.randn((int(self._places.max()) + 1, channels // 2, *size), generator=source)
        return module.denoising_losses(
            batch,
            self._timesteps[mine, column].to(module.device),
            noises[self._places[mine]].to(module.device),
        )

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the chosen weights in place, before the result is written."""
        assert isinstance(pl_module, InvariantAdapter)
        for name, parameter in pl_module.trainable_parameters().items():
            if name in self._kept:
                parameter.copy_(self._kept[name])
        # A run that was interrupted after its last step does not start training again.
        measured = self._prepare(trainer, pl_module)
        self.report = self._report(pl_module) if measured else {"reason": NOTHING_HELD_OUT}
        if trainer.is_global_zero and self.output is not None:
            write_json(Path(self.output) / "heldout.json", self.report)

    def _report(self, module: InvariantAdapter) -> dict[str, Any]:
        edges = self._edges.tolist()
        bins = [
            {
                "from": edges[number],
                "to": edges[number + 1] - 1,
                "share_of_draws": float(self._objective.shares[number]),
                **{
                    when: bin_figures(self._losses[when][:, number], self._objective.weights)
                    for when in ("before", "after")
                },
            }
            for number in range(self.bins)
        ]
        return {
            "images": len(self._objective.weights),
            "objective": module.hparams["objective"],
            "lambda": module.hparams["lambda_"],
            "selection": {
                "criterion": CRITERION,
                "chosen_step": self._chosen_step,
                "candidates": self._candidates,
            },
            "bins": bins,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured and the weights kept, for checkpoints."""
        if not self._candidates:
            return {}
        return {
            "candidates": self._candidates,
            "chosen_step": self._chosen_step,
            "losses": self._losses,
            "kept": self._kept,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        if state_dict:
            self._candidates = list(state_dict["candidates"])
            self._chosen_step = state_dict["chosen_step"]
            self._losses, self._kept = dict(state_dict["losses"]), dict(state_dict["kept"])
