"""How strongly the trained adapter is applied: told by the samples' own environments."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.diffusion.draws import generator
from invdiff_pl.diffusion.features import middle_features
from invdiff_pl.diffusion.noising import sample_posterior
from invdiff_pl.diffusion.pipeline import sample_antithetic_latents
from invdiff_pl.environments.reader import EnvironmentReader, even_scale, fit_reader
from invdiff_pl.files import write_json
from invdiff_pl.modules.invariant_adapter import InvariantAdapter
from invdiff_pl.objectives.heldout import round_robin

# Samples of numbers that no run draws for its figures, so that those are of other noises.
FIRST_SAMPLE = 2**31
# Scales that are tried: the first two always, the others where the even one lies beyond.
TRIED = (1.0, 1.5)
BEYOND = {1.0: 0.5, 1.5: 2.0}
# Of all timesteps: where images are looked at, still clear enough to show everything.
LOOK = 0.3
CRITERION = (
    "the scale at which the inferred environments are drawn most evenly, by a reader of the frozen "
    "denoiser's features that has learned the inferred environments; labels are not read"
)


class ScaleCalibration(pl.Callback):
    """Makes scale 1 the one at which the inferred environments are drawn evenly.

    Training lowers a denoising risk, and stops short of even samples, or goes past them, by as much
    as the adapter's size, steps and rate happen to. So, after training, samples are drawn at a
    few scales, in pairs of opposite noise, and counted by environment, and the adapter's weights
    are multiplied by the scale in between at which the environments are most even. No label is
    read, and the samples are of other noises than those that figures are taken from. Writes
    ``calibration.json`` into the adapter stage's folder.

    Must come after the callbacks that choose the weights. The reference's ``unet_copy`` is left as
    it is.

    Args:
        samples: drawn at each scale, over all prompts; 0 leaves the adapter as it is.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        images: of the training split, dealt over (prompt, environment), that the reader learns from
            at most.
        batch_size: images and samples together on a rank.
        least_recall: where the reader finds less of an environment's images again, samples cannot
            be counted, and the adapter is left as it is.
        seed: of all noises.
    """

    def __init__(
        self,
        samples: int = 512,
        steps: int = 20,
        guidance_scale: float = 2.0,
        images: int = 4096,
        batch_size: int = 128,
        least_recall: float = 0.75,
        seed: int = 0,
    ) -> None:
        self.samples = samples
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.images = images
        self.batch_size = batch_size
        self.least_recall = least_recall
        self.seed = seed

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, count, and rescale the adapter before the module writes it."""
        assert isinstance(pl_module, InvariantAdapter)
        data: BiasedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        wanted = pl_module.trains and self.samples > 0 and data.inferred().groups > 1
        if not (wanted and pl_module.adapter.rescalable):
            return
        modes = {part: part.training for part in pl_module.denoiser.modules()}
        pl_module.denoiser.eval()
        with trainer.precision_plugin.val_step_context():
            told = self._calibrate(trainer, pl_module)
        for part, training in modes.items():
            part.training = training
        pl_module.adapter.rescale(told["scale"])
        if trainer.is_global_zero:
            write_json(Path(pl_module.output) / "calibration.json", told)
            print(
                f"scale {told['scale']:.3f} of the trained adapter becomes its scale 1", flush=True
            )

    def _calibrate(self, trainer: pl.Trainer, module: InvariantAdapter) -> dict[str, Any]:
        adapter, pipeline = module.adapter, module.pipeline
        pipeline.to(module.device)
        frozen_pipeline_unet = pipeline.unet
        adapter.set_scale(0.0)
        reader = self._reader(trainer, module)
        told: dict[str, Any] = {
            "scale": 1.0,
            "criterion": CRITERION,
            "samples": self.samples,
            "reader": {
                "confusion": reader.confusion.tolist(),
                "directions": reader.projection.shape[1],
            },
            "measured": [],
        }
        if reader.recall < self.least_recall:
            told["reason"] = (
                f"environments cannot be told from features: of one only {reader.recall:.2f} are "
                "read rightly"
            )
        else:
            shares = {scale: self._shares(trainer, module, reader, scale) for scale in TRIED}
            scale = _most_even(shares)
            if scale in BEYOND:
                further = BEYOND[scale]
                shares[further] = self._shares(trainer, module, reader, further)
                scale = _most_even(shares)
            told["scale"] = scale
            told["measured"] = [
                {"scale": tried, "shares": shares[tried].tolist()} for tried in sorted(shares)
            ]
        adapter.prepare_sampling(pipeline, 0.0)
        adapter.set_scale(1.0)
        pipeline.unet = frozen_pipeline_unet
        return told

    def _reader(self, trainer: pl.Trainer, module: InvariantAdapter) -> EnvironmentReader:
        data: BiasedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        inferred = data.inferred()
        prompts = data.index.prompt_ids[data.index.rows("train")]
        everything = torch.arange(len(prompts))
        rows = round_robin(prompts, inferred.assignments, everything, self.images)[0].sort()[0]

        def latents(mine: Tensor) -> Tensor:
            batch = trainer.strategy.batch_to_device(data.training_latents(rows[mine]))
            scaling = module.pipeline.vae.config.scaling_factor
            return sample_posterior(batch["moments"], None, scaling)

        features = self._gathered(
            trainer, len(rows), lambda mine: self._features(module, latents(mine))
        )
        return fit_reader(
            features, prompts[rows], inferred.assignments[rows], inferred.groups, self.seed
        )

    def _shares(
        self,
        trainer: pl.Trainer,
        module: InvariantAdapter,
        reader: EnvironmentReader,
        scale: float,
    ) -> Tensor:
        """Shares of the environments in samples at a scale, float64 ``[P, G]``."""
        data: BiasedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        rank_zero_only(print)(
            f"counting environments in {self.samples} samples at scale {scale:g}", flush=True
        )
        prompts = torch.arange(self.samples) // 2 % len(data.prompts)

        def features(mine: Tensor) -> Tensor:
            module.adapter.prepare_sampling(module.pipeline, scale)
            drawn = sample_antithetic_latents(
                module.pipeline,
                module.embeddings[prompts[mine]],
                module.embeddings[-1:],
                (FIRST_SAMPLE + mine).tolist(),
                seed=self.seed,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
            )
            module.adapter.prepare_sampling(module.pipeline, 0.0)
            return self._features(module, drawn)

        read = reader.read(self._gathered(trainer, self.samples, features), prompts)
        groups = len(reader.confusion)
        counts = torch.zeros((len(data.prompts), groups), dtype=torch.int64)
        counts.index_add_(0, prompts, one_hot(read, groups))
        return reader.shares(counts)

    def _features(self, module: InvariantAdapter, latents: Tensor) -> Tensor:
        noise = torch.randn(latents.shape[1:], generator=generator(self.seed, "calibration"))
        return middle_features(
            module.adapter.unet,
            module.process,
            latents.float(),
            int(LOOK * module.process.train_timesteps),
            noise,
            module.embeddings[-1:],
        )

    def _gathered(self, trainer: pl.Trainer, count: int, features: Any) -> Tensor:
        """Features of ``count`` items on every rank, float32 ``[count, D]`` on the CPU."""
        mine = torch.arange(trainer.global_rank, count, trainer.world_size)
        parts = [features(part) for part in mine.split(self.batch_size)]
        own = torch.cat(parts)
        everybody = own.new_zeros((count, own.shape[1]))
        everybody[mine] = own
        gathered: Tensor = trainer.strategy.reduce(everybody, reduce_op="sum")
        return gathered.cpu()


def _most_even(shares: dict[float, Tensor]) -> float:
    scales = sorted(shares)
    table = torch.stack([shares[scale] for scale in scales])
    return round(even_scale(torch.tensor(scales, dtype=torch.float64), table), 3)
