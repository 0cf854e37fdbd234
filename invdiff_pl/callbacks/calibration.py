"""Calibration of the trained adapter's scale, by the environments of samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from invdiff_pl.backbones.pipeline import sample_antithetic_latents
from invdiff_pl.data.training import LatentDataModule, training_data
from invdiff_pl.environments.features import BlockFeatures
from invdiff_pl.environments.reader import Counts, EnvironmentReader, even_scale, fit_reader
from invdiff_pl.modules.common import stage_name
from invdiff_pl.modules.invariant_adapter import InvariantAdapter
from invdiff_pl.objectives.heldout import round_robin
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import write_json
from invdiff_pl.utils.progress import track

# Sample numbers that no run draws for its figures, so that figures are of other noises.
FIRST_SAMPLE = 2**31
# Scales that are tried: the first two always, one of the others if the even scale lies beyond.
TRIED = (1.0, 1.5)
BEYOND = {1.0: 0.5, 1.5: 2.0}
# Log signal-to-noise ratio at which images are read, still clear enough to show everything.
LOOK = 0.26
# Prompts are left out rather than counted with fewer samples than this.
SAMPLES_A_PROMPT = 64
Features = Callable[[Tensor], Tensor]
CRITERION = (
    "the scale at which the inferred environments are drawn most evenly, as counted by a reader of "
    "the frozen denoiser's features that was fitted to them; labels are not read"
)


class ScaleCalibration(pl.Callback):
    """Makes scale 1 the one at which the inferred environments are drawn evenly.

    Training lowers a denoising risk, and stops short of even samples, or goes past them, depending
    on the adapter's size, the steps and the rate. So, after training, samples are drawn at a few
    scales, in pairs of opposite noise, and counted by environment, and the adapter's weights are
    multiplied by the scale in between at which the environments are most even. No labels are
    read, and the noises are not those of the samples that figures are taken from. ``report`` holds
    what was measured.

    The aim is even shares of the environments, whatever shares samples are scored against. If
    shares cannot be counted, or do not change with the scale, the adapter is left as trained and
    the ``reason`` is reported. If even shares lie beyond the scales that are tried, the nearest is
    taken, with a ``warning``: environments that mix several attributes are one cause.

    This callback must come after those that choose the weights. The reference's ``unet_copy`` is
    left as it is.

    Args:
        samples: number of samples drawn at each scale, over all prompts or, if that would be fewer
            than 64 per prompt, over those with most images; 0 leaves the adapter as it is.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance.
        images: maximum number of images of the training split, dealt over (prompt, environment),
            that the reader learns from.
        batch_size: number of images or samples processed together on a rank.
        least_recall: smallest recall of the reader, over environments, with which samples can be
            counted; below it, the adapter is left as it is.
        output: folder that ``calibration.json`` is written to; nothing is written if not given.
        seed: seed of all noises.
    """

    changes_result = True

    def __init__(
        self,
        samples: int = 512,
        steps: int = 20,
        guidance_scale: float = 2.0,
        images: int = 4096,
        batch_size: int = 128,
        least_recall: float = 0.75,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        if samples < 0:
            raise InvDiffError(f"samples={samples}: expected 0 or more.", "samples")
        self.samples = samples
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.images = images
        self.batch_size = batch_size
        self.least_recall = least_recall
        self.output = output
        # What was measured, once training has ended.
        self.report: dict[str, Any] = {}
        self.seed = seed

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, count, and rescale the adapter before it is written."""
        assert isinstance(pl_module, InvariantAdapter)
        adapter, pipeline = pl_module.adapter, pl_module.pipeline
        data = training_data(trainer)
        wanted = pl_module.trains and self.samples > 0 and data.inferred().groups > 1
        if not (wanted and adapter.rescalable):
            return
        pipeline.to(pl_module.device)
        denoiser = pl_module.frozen.network
        modes = {part: part.training for part in pl_module.denoiser.modules()}
        pl_module.denoiser.eval()
        with trainer.precision_plugin.val_step_context():
            told = self._calibrate(trainer, pl_module)
        self._place(pl_module, 0.0)
        adapter.set_scale(1.0)
        pl_module.frozen.network = denoiser
        for part, training in modes.items():
            part.training = training
        adapter.rescale(told["scale"])
        self.report = told
        if trainer.is_global_zero:
            if self.output is not None:
                write_json(Path(self.output) / "calibration.json", told)
            why = f" ({told['reason']})" if "reason" in told else ""
            print(
                f"scale {told['scale']:.3f} of the trained adapter becomes its scale 1{why}",
                flush=True,
            )
            if "warning" in told:
                print(f"warning: {told['warning']}", flush=True)

    def _calibrate(self, trainer: pl.Trainer, module: InvariantAdapter) -> dict[str, Any]:
        data = training_data(trainer)
        prompts = self._prompts(data)
        told: dict[str, Any] = {"scale": 1.0, "criterion": CRITERION, "measured": []}
        told |= {"prompts": [data.prompts[prompt] for prompt in prompts.tolist()]}
        try:
            if len(prompts) == 0:
                raise ValueError("no prompt has training images of every environment")
            reader = self._reader(trainer, module)
            told["reader"] = {
                "confusion": reader.confusion.tolist(),
                "directions": reader.projection.shape[1],
            }
            # Ranks may differ in their last digits, and must go the same way.
            recall = trainer.strategy.broadcast(reader.recall)
            if recall < self.least_recall:
                raise ValueError(
                    f"environments cannot be told from features: of one, only {recall:.2f} are "
                    "read correctly"
                )
            counts = {s: self._counts(trainer, module, reader, prompts, s) for s in TRIED}
            scale = trainer.strategy.broadcast(even_scale(counts))
            if scale in BEYOND:
                further = BEYOND[scale]
                counts[further] = self._counts(trainer, module, reader, prompts, further)
                scale = trainer.strategy.broadcast(even_scale(counts))
            told["samples"] = next(iter(counts.values())).pairs[..., 0].numel() * 2
            told["measured"] = [
                {"scale": tried, "shares": counts[tried].shares.tolist()}
                for tried in sorted(counts)
            ]
            if scale is None:
                raise ValueError("the environments' shares do not change with the scale")
            told["scale"] = round(scale, 3)
            if scale in BEYOND.values():
                told["warning"] = (
                    f"even shares lie beyond scale {scale:g}, the last that is tried: the "
                    "environments may mix several attributes; look at the candidates before you "
                    "use the adapter"
                )
        except ValueError as error:
            told["reason"] = str(error)
        return told

    def _prompts(self, data: LatentDataModule) -> Tensor:
        """Return the prompts to count, int64: those of most images that hold every environment."""
        inferred = data.inferred()
        cells = data.train_prompts() * inferred.groups
        cells = cells + inferred.assignments
        size = len(data.prompts) * inferred.groups
        sizes = cells.bincount(minlength=size).view(-1, inferred.groups)
        complete = (sizes > 0).all(1)
        order = torch.where(complete, sizes.sum(1), -1).argsort(descending=True, stable=True)
        most = max(1, self.samples // SAMPLES_A_PROMPT)
        return order[: min(most, int(complete.sum()))].sort()[0]

    def _reader(self, trainer: pl.Trainer, module: InvariantAdapter) -> EnvironmentReader:
        data = training_data(trainer)
        inferred = data.inferred()
        prompts = data.train_prompts()
        everything = torch.arange(len(prompts))
        rows = round_robin(prompts, inferred.assignments, everything, self.images)[0].sort()[0]
        self._place(module, 0.0)

        def features(mine: Tensor) -> Tensor:
            batch = trainer.strategy.batch_to_device(data.training_latents(rows[mine]))
            return self._features(module, module.frozen.latents(batch["moments"]))

        table = self._gathered(trainer, module, len(rows), features)
        return fit_reader(
            table, prompts[rows], inferred.assignments[rows], inferred.groups, self.seed
        )

    def _counts(
        self,
        trainer: pl.Trainer,
        module: InvariantAdapter,
        reader: EnvironmentReader,
        counted: Tensor,
        scale: float,
    ) -> Counts:
        """Count the environments of samples at a scale."""
        pairs = max(2, self.samples // (2 * len(counted)))
        count = 2 * pairs * len(counted)
        rank_zero_only(print)(f"counting environments in {count} samples at scale {scale:g}")
        prompts = counted[torch.arange(count) // (2 * pairs)]

        def features(mine: Tensor) -> Tensor:
            self._place(module, scale)
            drawn = sample_antithetic_latents(
                module.pipeline,
                module.conditions[prompts[mine]],
                module.conditions.null,
                (FIRST_SAMPLE + mine).tolist(),
                seed=self.seed,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                resolution=module.frozen.resolution,
            )
            self._place(module, 0.0)
            return self._features(module, drawn)

        read = reader.read(self._gathered(trainer, module, count, features), prompts)
        return Counts(reader.corrected(read).view(len(counted), pairs, 2, -1).mean(2))

    def _place(self, module: InvariantAdapter, scale: float) -> None:
        """Put the adapter at a scale, folded into the weights if rounding cannot lose it."""
        if module.adapter.network.dtype == torch.float32:
            module.adapter.prepare_sampling(module.pipeline, scale)
        else:
            module.frozen.network = module.adapter.denoiser
            module.adapter.set_scale(scale)

    def _features(self, module: InvariantAdapter, latents: Tensor) -> Tensor:
        reader = BlockFeatures(
            module.frozen, module.conditions.null, None, [LOOK], self.seed, module.adapter.network
        )
        return reader(latents)

    def _gathered(
        self, trainer: pl.Trainer, module: InvariantAdapter, count: int, features: Features
    ) -> Tensor:
        """Gather features of ``count`` items on every rank, float32 ``[count, D]`` on the CPU.

        Raises:
            ValueError: on every rank, if some are not finite.
        """
        self._place(module, 0.0)
        latents = module.frozen.initial_noise([0], 0)[0].to(module.device)
        width = self._features(module, latents).shape[1]
        everybody = torch.zeros((count, width), device=module.device)
        mine = torch.arange(trainer.global_rank, count, trainer.world_size)
        what = f"{stage_name(module)}, calibration"
        for part in track(mine.split(self.batch_size), what, unit="batch", bar=False):
            if len(part) > 0:
                everybody[part] = features(part)
        gathered: Tensor = trainer.strategy.reduce(everybody, reduce_op="sum")
        if not bool(gathered.isfinite().all()):
            raise ValueError("features of images or samples are not finite")
        return gathered.cpu()
