"""Each measure switched on alone, against the reference's step without any."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from bench_recipes import autocast, prepare
from bench_stages import GUIDANCE, Sampling, Training
from bench_work import PROMPTS, ReferenceInputs, Work, text_embeddings
from torch import Tensor

from invdiff_pl.backbones.latents import scaled_latents
from invdiff_pl.backbones.noising import ForwardProcess, sample_losses
from invdiff_pl.backbones.pipeline import sample_images, set_scheduler
from invdiff_pl.data.cache import ShardedTensor


@dataclass(frozen=True)
class Rung:
    """One measure that is switched on.

    Attributes:
        stage: stage in which it is switched on.
        measure: name of the measure.
        without: one round of the reference's step.
        with_it: the same with the measure.
        work: how many times as much the latter does in a round.
    """

    stage: str
    measure: str
    without: Callable[[], object]
    with_it: Callable[[], object]
    work: float = 1.0


class Steps:
    """Steps of scoring and training as in the reference, except for one measure."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.inputs = ReferenceInputs(work)
        self.process = ForwardProcess(self.inputs.pipeline.scheduler.config)
        folder = work.folder / "latents"
        if not folder.exists():
            prepare(work, self.inputs, folder)
        self.cache = ShardedTensor(folder)
        self.embeddings = text_embeddings(self.inputs.pipeline, PROMPTS)
        self.rows = torch.arange(work.batch) % len(work.paths)

    def latents(self, cached: bool) -> Tensor:
        """Return one batch's latents, from the cache or from files through the VAE."""
        if not cached:
            return self.inputs.encode(self.inputs.read(self.rows))
        moments = self.cache.gather(self.rows, torch.zeros_like(self.rows))
        return scaled_latents(self.inputs.pipeline.vae.config, moments.to(self.work.device))

    def text(self, cached: bool) -> Tensor:
        """Return one batch's embeddings, from the cache or through the text encoder."""
        if not cached:
            return self.inputs.embed(self.rows)
        return self.embeddings[self.work.prompt_ids[self.rows].to(self.work.device)]

    def losses(self, denoiser: torch.nn.Module, measure: str = "", paired: bool = False) -> Tensor:
        """Compute the losses of one batch with a measure."""
        clean = self.latents(measure == "latent cache")
        text = self.text(measure == "embedding cache")
        count = len(clean) // 2 if paired else len(clean)
        noise = torch.randn_like(clean[:count])
        timesteps = torch.randint(self.process.train_timesteps, (count,), device=clean.device)
        if paired:
            noise, timesteps = noise.repeat(2, 1, 1, 1), timesteps.repeat(2)
        noisy = self.process.add_noise(clean, noise, timesteps)
        if measure == "channels_last":
            noisy = noisy.to(memory_format=torch.channels_last)
        with autocast(self.work, measure == "bf16"):
            prediction = denoiser(noisy, timesteps, text, return_dict=False)[0]
        return sample_losses(prediction, self.process.target(clean, noise, timesteps))


def scoring_rungs(work: Work, compiled: bool) -> Iterator[Rung]:
    """Yield the measures of scoring."""
    steps = Steps(work)
    plain = work.pipeline().unet
    variants = {"channels_last": work.pipeline().unet.to(memory_format=torch.channels_last)}
    if compiled:
        variants["torch.compile"] = torch.compile(work.pipeline().unet)

    def score(measure: str = "") -> None:
        with torch.inference_mode(measure == "inference mode"), torch.no_grad():
            steps.losses(variants.get(measure, plain), measure)

    measures = ("latent cache", "embedding cache", "inference mode", "bf16", *variants)
    for measure in measures:
        yield Rung("scoring", measure, score, lambda measure=measure: score(measure))
    # One timestep for every picture read, or four for the same inputs.
    clean, text = steps.latents(True), steps.text(True)

    def grid() -> None:
        with torch.no_grad():
            for timestep in (740, 800, 860, 920):
                noise = torch.randn_like(clean[:1]).expand_as(clean)
                at = torch.full((len(clean),), timestep, device=clean.device)
                noisy = steps.process.add_noise(clean, noise, at)
                sample_losses(plain(noisy, at, text).sample, noise)

    yield Rung("scoring", "both caches, four timesteps with common noise", score, grid, 4.0)


def training_rungs(work: Work, compiled: bool) -> Iterator[Rung]:
    """Yield the measures of adapter training, with the shipped LoRA."""
    steps, plain = Steps(work), Training(work, "lora")
    variants = {"channels_last": Training(work, "lora")}
    variants["channels_last"].theirs.adapter.network.to(memory_format=torch.channels_last)
    variants["updates folded"] = Training(work, "lora")
    variants["updates folded"].theirs.adapter.prepare_training()
    if compiled:
        variants["torch.compile"] = Training(work, "lora")
        variants["torch.compile"].theirs.adapter.network.compile()

    def train(measure: str = "") -> None:
        chosen = variants.get(measure, plain)
        denoiser = chosen.theirs.adapter.denoiser
        losses = steps.losses(denoiser, measure, paired=measure == "paired draws")
        half = len(losses) // 2
        risks = torch.stack([losses[:half].mean(), losses[half:].mean()])
        (risks.mean() + risks.var()).backward()
        optimizer = fused if measure == "fused AdamW" else chosen.their_optimizer
        optimizer.step()
        optimizer.zero_grad()

    fused = torch.optim.AdamW(plain.theirs.adapter.parameters().values(), lr=1e-4, fused=True)
    alone = ("latent cache", "embedding cache", "paired draws", "fused AdamW", "bf16")
    for measure in (*alone, *variants):
        yield Rung("adapter (lora)", measure, train, lambda measure=measure: train(measure))
    yield from frozen_rungs(work, steps)


def frozen_rungs(work: Work, steps: Steps) -> Iterator[Rung]:
    """Yield the measures of the frozen branch, for an adapter that is a separate network."""
    small, half = Training(work, "small_unet"), work.pipeline().unet.to(torch.bfloat16)
    branch = small.theirs.adapter.denoiser.branch
    frozen = small.theirs.adapter.network

    class InHalf(torch.nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, **_: bool) -> list:
            with torch.no_grad():
                kept = half(noisy.bfloat16(), timesteps, text.bfloat16()).sample.float()
            return [kept + branch(noisy, timesteps, text).sample]

    class WithGraph(torch.nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, **_: bool) -> list:
            return [
                frozen(noisy.requires_grad_(), timesteps, text).sample
                + branch(noisy, timesteps, text).sample
            ]

    def train(denoiser: torch.nn.Module) -> None:
        steps.losses(denoiser).mean().backward()
        small.their_optimizer.step()
        small.their_optimizer.zero_grad()

    plain, in_half, graph = small.theirs.adapter.denoiser, InHalf(), WithGraph()
    stage = "adapter (small_unet)"
    yield Rung(stage, "frozen branch in bf16", lambda: train(plain), lambda: train(in_half))
    yield Rung(stage, "frozen branch without a graph", lambda: train(graph), lambda: train(plain))


def sampling_rungs(work: Work) -> Iterator[Rung]:
    """Yield the measures of sampling, against one prompt at a time and 50 steps of PNDM."""
    both = Sampling(work, theirs=1)
    both.solvers("PNDMScheduler", "PNDMScheduler")
    fast = Training(work, "lora").theirs.pipeline.to(work.device)
    set_scheduler(fast, "DPMSolverMultistepScheduler")
    count = min(16, work.batch)

    def draw(pipeline: object, numbers: int = 1, steps: int = 50, half: bool = False) -> None:
        with autocast(work, half):
            sample_images(
                pipeline,  # type: ignore[arg-type]
                {"prompt_embeds": both.embeddings[:1].repeat(numbers, 1, 1)},
                {"prompt_embeds": both.embeddings[-1:]},
                range(numbers),
                seed=0,
                steps=steps,
                guidance_scale=GUIDANCE,
            )

    def plain() -> None:
        draw(both.theirs)

    yield Rung(
        "sampling", f"{count} prompts together", plain, lambda: draw(both.theirs, count), count
    )
    yield Rung("sampling", "20 steps of DPM-Solver++", plain, lambda: draw(fast, steps=20))
    yield Rung("sampling", "LoRA folded", plain, lambda: draw(both.pipeline))
    yield Rung("sampling", "bf16", plain, lambda: draw(both.theirs, half=True))


def rungs(work: Work, compiled: bool) -> Iterator[Rung]:
    """Yield all measures; models live as long as their stage."""
    yield from scoring_rungs(work, compiled)
    yield from training_rungs(work, compiled)
    yield from sampling_rungs(work)
