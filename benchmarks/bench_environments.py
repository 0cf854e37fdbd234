"""Environment inference in the reference's recipe, as METHOD describes it, and in ours."""

import shutil
from collections.abc import Callable

import torch
from ablation_groups import gradient_memberships
from bench_recipes import Stage, autocast, prepare
from bench_work import PROMPTS, ReferenceInputs, Work, text_embeddings
from torch import Tensor

from invdiff_pl.backbones.draws import generator, stratified_timesteps
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.latents import scaled_latents
from invdiff_pl.backbones.noising import ForwardProcess, sample_losses
from invdiff_pl.data.cache import ShardedTensor
from invdiff_pl.environments.features import (
    EARLIEST,
    LATEST,
    NOISES,
    TIMESTEPS,
    BlockFeatures,
    DenoisingLosses,
)
from invdiff_pl.environments.hidden_attribute import find_hidden_attributes
from invdiff_pl.environments.partition import partition as exact_partition
from invdiff_pl.environments.table import FeatureTable
from invdiff_pl.utils.operations import count_operations

# Images and prompts of a mini run, and components in which the stand-ins for their features vary.
IMAGES, SPECIES, COMPONENTS = 4795, 6, 64


class Scoring:
    """Denoising losses of every picture, ours computed as in the environment stage."""

    def __init__(self, work: Work, half: bool = False) -> None:
        self.work, self.half = work, half
        self.inputs = ReferenceInputs(work)
        self.process = ForwardProcess(self.inputs.pipeline.scheduler.config)
        self.unet = self.inputs.pipeline.unet
        if work.compiled:
            self.unet.compile()
        self.losses = DenoisingLosses(frozen_denoiser(self.inputs.pipeline))
        self.embeddings = text_embeddings(self.inputs.pipeline, PROMPTS)
        self.cache = work.folder / "latents"
        if not self.cache.exists():
            prepare(work, self.inputs, self.cache)
        self.calls = TIMESTEPS * NOISES

    @torch.no_grad()
    def reference(self) -> None:
        """Score at one random timestep and noise per picture; lists on the device keep all."""
        kept: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for rows in self.work.rows():
            clean = self.inputs.encode(self.inputs.read(rows))
            text = self.inputs.embed(rows)
            noise = torch.randn_like(clean)
            size = (len(rows),)
            timesteps = torch.randint(self.process.train_timesteps, size, device=clean.device)
            noisy = self.process.add_noise(clean, noise, timesteps)
            prediction = self.inputs.pipeline.unet(noisy, timesteps, text).sample
            target = self.process.target(clean, noise, timesteps)
            for values, whole in zip((clean, target, prediction), kept, strict=True):
                whole.append(values)
        sample_losses(torch.cat(kept[2]), torch.cat(kept[0]))

    def ours(self) -> None:
        """Score cached latents; only losses are kept."""
        self._tabled(lambda latents, text: self.losses(latents, {"prompt_embeds": text}))

    @torch.inference_mode()
    def _tabled(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Tabulate a function of cached latents and their prompts' embeddings."""
        work, folder = self.work, self.work.folder / "scored"
        shutil.rmtree(folder, ignore_errors=True)
        table, cache = FeatureTable(folder), ShardedTensor(self.cache)
        config = self.inputs.pipeline.vae.config
        with autocast(work, self.half):
            for rows in work.rows():
                moments = cache.gather(rows, torch.zeros_like(rows)).to(work.device)
                prompts = work.prompt_ids[rows]
                text = self.embeddings[prompts.to(self.embeddings.device)]
                table.append(rows, prompts, of(scaled_latents(config, moments), text))
        table.flush()

    @torch.no_grad()
    def parity(self) -> str:
        """Compare the reference's loss at our draws with ours; both use the right target."""
        self.ours()
        folder = self.work.folder / "scored"
        ours = FeatureTable(folder).read(folder / "features.npy")
        rows, worst = self.work.rows()[0], 0.0
        clean, text = self.inputs.encode(self.inputs.read(rows)), self.inputs.embed(rows)
        grid = stratified_timesteps(TIMESTEPS, self.process.train_timesteps, EARLIEST, LATEST)
        for column, timestep in enumerate(grid.tolist()):
            source = generator(0, "common noise", column, 0)
            noise = torch.randn(clean.shape[1:], generator=source).to(clean).expand_as(clean)
            timesteps = torch.full((len(rows),), timestep, device=clean.device)
            noisy = self.process.add_noise(clean, noise, timesteps)
            prediction = self.inputs.pipeline.unet(noisy, timesteps, text).sample
            theirs = sample_losses(prediction, self.process.target(clean, noise, timesteps)).cpu()
            worst = max(
                worst, float((theirs / ours[rows, NOISES * column].float() - 1).abs().max())
            )
        return f"losses differ by {worst:.1e} at most"

    def required(self) -> int:
        """Count the operations of one denoiser call for one picture."""
        unet = self.inputs.pipeline.unet
        noisy = torch.zeros(1, unet.config.in_channels, *[unet.config.sample_size] * 2)
        given = noisy.to(unet.device), torch.tensor(0), self.embeddings[:1]
        with torch.no_grad():
            return count_operations(lambda: unet(*given))


def scoring(work: Work, half: bool = False) -> Stage:
    """Return the stage of denoising losses, counted by (picture, timestep)."""
    both = Scoring(work, half)
    counts = len(work.paths), both.calls * len(work.paths)
    unit = "(image, timestep)"
    return Stage("scoring", unit, both.reference, both.ours, counts, both.parity(), both.required())


class Features(Scoring):
    """The basis of environment inference: the reference's scores, our features of the block."""

    def __init__(self, work: Work, half: bool = False) -> None:
        super().__init__(work, half)
        null = {"prompt_embeds": text_embeddings(self.inputs.pipeline, [""])}
        self.block = BlockFeatures(frozen_denoiser(self.inputs.pipeline), null)

    def ours(self) -> None:
        """Compute features of cached latents, in passes that end at the middle block."""
        self._tabled(lambda latents, _: self.block(latents))


def features(work: Work, half: bool = False) -> Stage:
    """Return the stage of features, in place of which the reference has one score per image."""
    both = Features(work, half)
    counts = (len(work.paths),) * 2
    parity = "none: a score against features"
    return Stage("features", "images", both.reference, both.ours, counts, parity)


def search(work: Work, _: bool = False) -> Stage:
    """Return the stage of the search: the reference's ascent of scores, our fit with its tests."""
    images = IMAGES
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(images) % SPECIES
    own = torch.rand(images, generator=source) < 0.95
    on_water = (prompts < SPECIES // 2) == own
    noise = torch.randn(images, COMPONENTS, generator=source)
    shown = noise + 6 * on_water[:, None] * torch.eye(COMPONENTS)[0]
    scores = torch.randn(images, generator=source, dtype=torch.float64) + 4 * ~own

    def found() -> str:
        return find_hidden_attributes(shown, prompts)[0].verdict

    def reference() -> Tensor:
        return gradient_memberships(scores, 2)

    parity = f"none; ours says {found()}"
    return Stage("search", "images", reference, found, (images, images), parity)


def partition(work: Work, _: bool = False, images: int = IMAGES) -> Stage:
    """Return the stage that splits scores in two: the reference's 500 epochs, and the exact cut."""
    source = torch.Generator().manual_seed(0)
    rare = (torch.rand(images, generator=source) < 0.05).double()
    scores = torch.randn(images, generator=source, dtype=torch.float64) + 4 * rare
    prompts = torch.zeros(images, dtype=torch.int64)

    def spread(assignments: Tensor) -> float:
        means = [scores[assignments == group].mean() for group in (0, 1)]
        share = assignments.double().mean()
        return float(share * (1 - share) * (means[1] - means[0]).square())

    def reference() -> float:
        return spread(gradient_memberships(scores, 2).argmax(1))

    def ours() -> float:
        return spread(exact_partition(scores, prompts))

    parity = f"spread reached: {ours():.3f} against {reference():.3f}"
    return Stage("partition", "images", reference, ours, (images, images), parity)
