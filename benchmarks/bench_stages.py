"""Each stage in the reference's recipe, as METHOD describes it, and in ours."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_environments import features, partition, scoring, search
from bench_recipes import Stage, autocast, prepare
from bench_work import PROMPTS, ReferenceInputs, Work, text_embeddings
from loader import loader
from metrics import CLASSES, stand_ins
from PIL import Image
from torch import Tensor

from invdiff_pl.adapters import Adapter
from invdiff_pl.adapters.low_rank import FoldedConv2d, FoldedLinear
from invdiff_pl.backbones.latents import scaled_latents
from invdiff_pl.backbones.noising import predict, sample_losses
from invdiff_pl.backbones.pipeline import load_pipeline, sample_images, set_scheduler
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.cache import ShardedTensor
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.data.images import read_images, to_float
from invdiff_pl.metrics.sample_scores import SampleScores
from invdiff_pl.metrics.scorers import MAIN
from invdiff_pl.modules import InvariantAdapter
from invdiff_pl.objectives import build_density, build_rule, group_objective
from invdiff_pl.utils.images import ImageWriter
from invdiff_pl.utils.operations import count_operations

VISITS = 4  # how often the mini scale's adapter stage visits an image
GUIDANCE = 1.0


def latents(work: Work, _: bool = False) -> Stage:
    """Return the stage of every picture's latents, as often as training asks for them."""
    inputs, folder = ReferenceInputs(work), work.folder / "prepared"

    def reference() -> None:
        for _ in range(VISITS):
            for rows in work.rows():
                inputs.encode(inputs.read(rows))

    def ours() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        prepare(work, inputs, folder)
        cache = ShardedTensor(folder)
        for _ in range(VISITS):
            for rows in work.rows():
                cache.gather(rows, torch.zeros_like(rows)).to(work.device)

    ours()
    rows = work.rows()[0]
    moments = ShardedTensor(folder).gather(rows, torch.zeros_like(rows))
    cached = scaled_latents(inputs.pipeline.vae.config, moments)
    apart = (cached.to(work.device) - inputs.encode(inputs.read(rows))).abs().max()
    visits = VISITS * len(work.paths)
    parity = f"latents differ by {float(apart):.1e} at most (float16)"
    return Stage("latent preparation", "latents", reference, ours, (visits, visits), parity)


def as_peft_trains(adapter: Adapter) -> None:
    """Let a LoRA's layers compute their updates beside the weights in training, too."""
    for layer in adapter.network.modules():
        if isinstance(layer, FoldedLinear | FoldedConv2d):
            (layer.__class__,) = type(layer).__bases__


class Training:
    """Steps of adapter training, with the same adapter on both sides."""

    def __init__(self, work: Work, adapter: str, half: bool = False, steps: int = 2) -> None:
        self.work, self.half, self.steps = work, half, steps
        self.inputs = ReferenceInputs(work)
        self.theirs, self.ours_module = (
            InvariantAdapter(work.backbone, adapter=adapter).to(work.device) for _ in range(2)
        )
        as_peft_trains(self.theirs.adapter)
        if work.compiled:
            self.ours_module.denoiser.compile()
        embeddings = text_embeddings(self.inputs.pipeline, [*PROMPTS, ""])
        self.ours_module.use_prompts(Conditions({"prompt_embeds": embeddings}))
        self.rule = build_rule("variance", 2, 1.0)
        process = self.ours_module.process
        self.density = build_density("high_noise", process.train_timesteps, 1 / 3)
        cache = work.folder / "latents"
        if not cache.exists():
            prepare(work, self.inputs, cache)
        self.batches = iter(loader(cache, len(work.paths), work.batch, 1_000_000, paired=True))
        mine, others = self.ours_module.adapter, self.theirs.adapter
        self.optimizer = torch.optim.AdamW(mine.parameters().values(), lr=1e-4, fused=True)
        self.their_optimizer = torch.optim.AdamW(others.parameters().values(), lr=1e-4)
        self.waits = {"reference": 0.0, "ours": 0.0}
        self.source = torch.Generator().manual_seed(0)

    def reference(self) -> None:
        """Train on random batches: files, VAE and text encoder in each step, one draw per image."""
        process, adapter = self.theirs.process, self.theirs.adapter
        for _ in range(self.steps):
            rows = torch.randint(len(self.work.paths), (self.work.batch,), generator=self.source)
            started = self.work.clock()
            pixels = self.inputs.read(rows)
            self.waits["reference"] += self.work.clock() - started
            clean, text = self.inputs.encode(pixels), self.inputs.embed(rows)
            noise = torch.randn_like(clean)
            timesteps = torch.randint(process.train_timesteps, rows.shape, device=clean.device)
            noisy = process.add_noise(clean, noise, timesteps)
            prediction = predict(adapter.denoiser, noisy, timesteps, text)
            losses = sample_losses(prediction, process.target(clean, noise, timesteps))
            weights = torch.nn.functional.one_hot(rows % 2, 2).float().to(losses.device)
            risks = (weights * losses[:, None]).sum(0) / weights.sum(0).clamp(min=1)
            (risks.mean() + risks.var()).backward()
            self.their_optimizer.step()
            self.their_optimizer.zero_grad()

    def ours(self) -> None:
        """Train on balanced pairs from the cache, with one timestep and noise per pair."""
        module, device = self.ours_module, self.work.device
        for _ in range(self.steps):
            started = self.work.clock()
            batch = next(self.batches)
            batch |= {n: v.to(device) for n, v in batch.items() if isinstance(v, torch.Tensor)}
            self.waits["ours"] += self.work.clock() - started
            draw, moments = batch["draw"], batch["moments"]
            pairs = self.work.batch // 2
            shape = (2, pairs, moments.shape[1] // 2, *moments.shape[2:])
            timesteps = self.density.sample(pairs, self.source).to(device)[draw]
            noise, posterior = torch.randn(shape, generator=self.source).to(device)[:, draw]
            prompts = batch["prompt"] % len(PROMPTS)
            with autocast(self.work, self.half):
                given = LatentBatch(moments=moments, prompt=prompts)
                losses = module.denoising_losses(given, timesteps, noise, posterior)
            group_objective(losses, batch["membership"], self.rule).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def parity(self) -> str:
        """Compare both losses at the same pictures, timesteps and noise, before any training."""
        rows, process = self.work.rows()[0], self.theirs.process
        clean, text = self.inputs.encode(self.inputs.read(rows)), self.inputs.embed(rows)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).to(clean)
        timesteps = (
            torch.linspace(0, process.train_timesteps - 1, len(rows)).long().to(clean.device)
        )
        prediction = predict(
            self.theirs.adapter.denoiser,
            process.add_noise(clean, noise, timesteps),
            timesteps,
            text,
        )
        theirs = sample_losses(prediction, process.target(clean, noise, timesteps))
        cache = ShardedTensor(self.work.folder / "latents")
        moments = cache.gather(rows, torch.zeros_like(rows)).to(clean.device)
        prompts = self.work.prompt_ids[rows].to(clean.device)
        with autocast(self.work, self.half):
            given = LatentBatch(moments=moments, prompt=prompts)
            ours = self.ours_module.denoising_losses(given, timesteps, noise)
        apart = float((ours / theirs - 1).abs().max())
        return f"losses differ by {apart:.1e} at most"

    def required(self) -> int:
        """Count one picture's operations forward and backward, as far as the adapter needs them."""
        module = self.ours_module
        unet = module.pipeline.unet
        noisy = torch.zeros(1, unet.config.in_channels, *[unet.config.sample_size] * 2)
        given = noisy.to(self.work.device), torch.tensor([0], device=self.work.device)
        text = module.conditions[:1]["prompt_embeds"]
        return count_operations(
            lambda: predict(module.adapter.denoiser, *given, text).square().mean().backward()
        )


def training(work: Work, half: bool = False, adapter: str = "lora") -> Stage:
    """Return the stage of training, with the same adapter on both sides, counted by picture."""
    both = Training(work, adapter, half)
    count = both.steps * work.batch
    stage = Stage(
        f"adapter ({adapter})", "images", both.reference, both.ours, (count, count), both.parity()
    )
    stage.required, stage.waits = both.required(), both.waits
    both.optimizer.zero_grad()
    return stage


class Sampling:
    """Sampling to PNG files; ours with the fast option, 20 steps of DPM-Solver++."""

    steps = (50, 20)

    def __init__(self, work: Work, half: bool = False, ours: int = 64, theirs: int = 2) -> None:
        self.work, self.half, self.counts = work, half, (theirs, ours)
        self.theirs, self.pipeline = (load_pipeline(work.backbone).to(work.device) for _ in "ab")
        adapters = [InvariantAdapter(pipe).adapter for pipe in (self.theirs, self.pipeline)]
        adapters[1].prepare_sampling(self.pipeline, 1.0)
        self.embeddings = text_embeddings(self.pipeline, [*PROMPTS, ""])
        self.solvers("PNDMScheduler", "DPMSolverMultistepScheduler")

    def solvers(self, theirs: str, ours: str) -> None:
        """Choose the schedulers."""
        set_scheduler(self.theirs, theirs)
        set_scheduler(self.pipeline, ours)

    def reference(self) -> None:
        """Draw one prompt at a time, with LoRA beside the weights and PNG files in between."""
        for number in range(self.counts[0]):
            image = self.theirs(
                PROMPTS[number % len(PROMPTS)],
                num_inference_steps=self.steps[0],
                guidance_scale=GUIDANCE,
            ).images[0]
            image.save(self.work.folder / f"reference-{number}.png")

    def ours(self) -> None:
        """Draw prompts in batches, with LoRA folded into the weights, files in the background."""
        writer = ImageWriter()
        numbers = torch.arange(self.counts[1])
        for number, image in enumerate(self.draw(self.pipeline, numbers, self.steps[1])):
            writer.write(self.work.folder / "drawn" / f"{number}.png", image)
        writer.close()

    def draw(self, pipeline: object, numbers: Tensor, steps: int) -> Tensor:
        """Draw the images of some sample numbers together."""
        with autocast(self.work, self.half):
            return sample_images(
                pipeline,  # type: ignore[arg-type]
                {"prompt_embeds": self.embeddings[numbers % len(PROMPTS)]},
                {"prompt_embeds": self.embeddings[-1:]},
                numbers.tolist(),
                seed=0,
                steps=steps,
                guidance_scale=GUIDANCE,
            )

    def parity(self) -> str:
        """Compare four steps of one solver: one by one, LoRA beside; batched, LoRA folded in."""
        self.solvers("DDIMScheduler", "DDIMScheduler")
        numbers = torch.arange(4)
        singly = torch.cat([self.draw(self.theirs, one, 4) for one in numbers.split(1)])
        together = self.draw(self.pipeline, numbers, 4)
        self.solvers("PNDMScheduler", "DPMSolverMultistepScheduler")
        apart = int((singly.int() - together.int()).abs().max())
        return f"pixels differ by {apart} of 255 at most"


def sampling(work: Work, half: bool = False) -> Stage:
    """Return the stage of sampling, counted by image."""
    both = Sampling(work, half, ours=work.batch)
    return Stage("sampling", "images", both.reference, both.ours, both.counts, both.parity())


class Evaluation:
    """Scoring a set of samples against as many reference pictures.

    Figures from sums cost the same on both sides and are left out.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.side = ReferenceInputs(work).side
        self.scorers = stand_ins(96, clip=False).to(work.device)
        self.samples = read_images(work.paths, self.side)
        # The reference pictures' features are in our cache from the first set of samples on.
        self.cached = torch.cat([self._features(chunk) for chunk in self.samples.split(work.batch)])

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return self.scorers.extractors[MAIN](images.to(self.work.device))

    @torch.no_grad()
    def reference(self) -> Tensor:
        """Read all files anew for each measure, one at a time, with real features every time."""
        found = []
        for path in self.work.paths:
            self.scorers.classifier(to_float(self._open(path)).to(self.work.device))
        for _measure in ("Fréchet distance", "recall"):
            for _set in ("reference pictures", "samples"):
                found = [self._features(self._open(path)) for path in self.work.paths]
        return torch.cat(found)

    def _open(self, path: Path) -> Tensor:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]

    @torch.no_grad()
    def ours(self) -> SampleScores:
        """Score batches from memory, as they are drawn, in one pass for all measures."""
        names = (PROMPTS, CLASSES)
        scores = SampleScores(self.scorers, *names, 3, None, self.work.device)
        scores.update_reference(MAIN, self.cached)
        for rows in self.work.rows():
            images = self.samples[rows].to(self.work.device)
            scores.update(self.work.prompt_ids[rows].to(self.work.device), images)
        return scores

    def parity(self) -> str:
        """Compare features taken one by one with features taken in batches."""
        apart = (self.reference() - self.cached).abs().max() / self.cached.abs().max()
        return f"features differ by {float(apart):.1e} of the largest"


def evaluation(work: Work, _: bool = False) -> Stage:
    """Return the stage of scoring samples, counted by image."""
    both = Evaluation(work)
    counts = (len(work.paths),) * 2
    return Stage("evaluation", "images", both.reference, both.ours, counts, both.parity())


STAGES: dict[str, Callable[[Work, bool], Stage]] = {
    "latents": latents,
    "scoring": scoring,
    "features": features,
    "partition": partition,
    "search": search,
    "adapter": training,
    "small_unet": lambda work, half: training(work, half, "small_unet"),
    "sampling": sampling,
    "evaluation": evaluation,
}
HALVES = ("scoring", "features", "adapter", "small_unet", "sampling")
COMPILED = ("scoring", "adapter", "small_unet")
