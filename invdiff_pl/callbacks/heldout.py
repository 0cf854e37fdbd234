"""Which checkpoint becomes the result: told by held-out risks, never by labels."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.callbacks.ema import ExponentialMovingAverage
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.diffusion.draws import generator
from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import write_json
from invdiff_pl.modules.invariant_adapter import InvariantAdapter
from invdiff_pl.objectives.heldout import (
    bin_figures,
    held_out_weights,
    round_robin,
    timestep_bins,
)

CRITERION = (
    "the objective of the held-out group risks in each timestep bin, averaged over bins as often "
    "as training draws them; the lowest wins, of equal ones the earliest"
)


class HeldOutSelection(pl.Callback):
    """Measures group risks on images that training never sees, and keeps the best weights.

    All images meet the same noises at the same timesteps, before training and every so many steps,
    so that differences are the adapter's. The weights of the lowest held-out objective (see
    ``CRITERION``) become the result, the untrained ones of step 0 included. Where an average of
    the weights is kept it is the average that is measured. Writes ``heldout.json`` into the
    adapter stage's folder: per timestep bin mean and worst group risk and the bound of METHOD,
    before and after. Labels are not read.

    Args:
        every_n_steps: between measurements; one is taken before training and one at its end.
        images: at most so many, dealt over (prompt, environment) in turn.
        bins: of timesteps, of equal width.
        draws: timesteps and noises in each bin.
        batch_size: images measured together on a rank.
        seed: of the noises.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        images: int = 192,
        bins: int = 10,
        draws: int = 1,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.images = images
        self.bins = bins
        self.draws = draws
        self.batch_size = batch_size
        self.seed = seed
        self._candidates: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a place before the average, which would undo the choice."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        later = callbacks[callbacks.index(self) :]
        if any(isinstance(callback, ExponentialMovingAverage) for callback in later):
            raise InvDiffError(
                "--trainer.callbacks: HeldOutSelection must come after ExponentialMovingAverage."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the images, and measure the backbone."""
        data: BiasedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        inferred, held = data.inferred(), data.held_out().nonzero().squeeze(1)
        prompts = data.index.prompt_ids[data.index.rows("train")]
        self.rows = round_robin(prompts, inferred.assignments, held, self.images)
        if len(self.rows):
            self.weights = held_out_weights(prompts[self.rows], inferred.memberships[self.rows])
        if not self._candidates:
            self._measure(trainer, pl_module)

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
            rows, value = self._risks(trainer, pl_module)
            lowest = min((c["value"] for c in self._candidates), default=torch.inf)
            self._candidates.append({"step": step, "value": value, "bins": rows})
            if value < lowest:
                self._best = {
                    name: parameter.detach().cpu().clone()
                    for name, parameter in pl_module.trainable_parameters().items()
                }
        finally:
            for average in averages:
                average.restore(pl_module)
        if trainer.logger is not None:
            trainer.logger.log_metrics({"heldout/objective": value}, step)

    @torch.no_grad()
    def _risks(
        self, trainer: pl.Trainer, module: InvariantAdapter
    ) -> tuple[list[dict[str, Any]], float]:
        """The theory table's rows, and the criterion."""
        edges, timesteps = timestep_bins(self.bins, module.process.train_timesteps, self.draws)
        with trainer.precision_plugin.val_step_context():
            losses = self._losses(trainer, module, timesteps)
        own = self.weights[trainer.global_rank :: trainer.world_size].to(losses.device)
        sums = torch.stack([losses.T @ own, losses.square().T @ own])
        sums = trainer.strategy.reduce(sums, reduce_op="sum").cpu()
        masses = self.weights.sum(0)
        present = masses > 0
        means, squares = sums.unflatten(1, timesteps.shape).mean(2)
        weights = module.loss_weights(timesteps.flatten().to(module.device)).cpu()
        weights = weights.reshape(timesteps.shape).mean(1).double()
        rule = module.rule
        value = 0.0
        rows = []
        for number in range(self.bins):
            first, end = int(edges[number]), int(edges[number + 1])
            share = module.density.mass(first, end)
            value += share * float(rule.value(weights[number] * means[number], masses))
            figures = bin_figures(means[number][present], squares[number][present])
            rows.append({"from": first, "to": end - 1, "share_of_draws": share, **figures})
        return rows, value

    def _losses(self, trainer: pl.Trainer, module: InvariantAdapter, timesteps: Tensor) -> Tensor:
        """Losses of this rank's images, float64 ``[n, bins * draws]``."""
        data: BiasedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        parts = []
        mine = self.rows[trainer.global_rank :: trainer.world_size]
        for rows in mine.split(self.batch_size):
            batch = trainer.strategy.batch_to_device(data.training_latents(rows))
            columns = []
            for column, timestep in enumerate(timesteps.flatten().tolist()):
                shape = (batch["moments"].shape[1] // 2, *batch["moments"].shape[2:])
                source = generator(self.seed, "held-out noise", column)
                noise = torch.randn(shape, generator=source).to(module.device)
                columns.append(
                    module.denoising_losses(
                        batch["moments"],
                        batch["prompt"],
                        torch.full((len(rows),), timestep, device=module.device),
                        noise.expand(len(rows), *shape),
                    )
                )
            parts.append(torch.stack(columns, dim=1).double())
        empty = torch.zeros((0, timesteps.numel()), dtype=torch.float64, device=module.device)
        return torch.cat([empty, *parts])

    @property
    def _chosen(self) -> dict[str, Any]:
        return min(self._candidates, key=lambda candidate: candidate["value"])

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the chosen weights in place, before the module writes its result."""
        assert isinstance(pl_module, InvariantAdapter)
        for name, parameter in pl_module.trainable_parameters().items():
            if name in self._best:
                parameter.copy_(self._best[name])
        if trainer.is_global_zero:
            write_json(Path(pl_module.output) / "heldout.json", self._report(pl_module))

    def _report(self, module: InvariantAdapter) -> dict[str, Any]:
        if not self._candidates:
            return {
                "reason": "no images are held out: --data.held_out is 0, or every (prompt, "
                "environment) is too small for it; the last weights are the result"
            }
        before, after = self._candidates[0]["bins"], self._chosen["bins"]
        described = ("from", "to", "share_of_draws")
        return {
            "draws_per_bin": self.draws,
            "objective": module.hparams["objective"],
            "lambda": module.hparams["lambda_"],
            "selection": {
                "criterion": CRITERION,
                "chosen_step": self._chosen["step"],
                "candidates": [{"step": c["step"], "value": c["value"]} for c in self._candidates],
            },
            "bins": [
                {
                    **{name: first[name] for name in described},
                    "before": {n: v for n, v in first.items() if n not in described},
                    "after": {n: v for n, v in last.items() if n not in described},
                }
                for first, last in zip(before, after, strict=True)
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """What was measured and the best weights, for checkpoints."""
        return {"candidates": self._candidates, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._candidates = list(state_dict["candidates"])
        self._best = dict(state_dict["best"])
