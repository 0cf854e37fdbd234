"""Guidance by clusters of the middle block, written from the description of SelfDebias.

The method (arXiv 2512.03749) needs no labels and trains nothing but a reading of the frozen model:
images drawn for a prompt are clustered by what they show, the clusters are read from the middle
block while further images are drawn, and a gradient evens out how often each is drawn. SelfDebias
reads the space of an image encoder from the middle block; here the block's own features are
clustered, so that only the frozen model is needed, as for the other methods in the comparison.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, log_softmax

from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser
from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.environments.features import BlockFeatures, block_output
from invdiff_pl.environments.shared_values import kmeans_memberships
from invdiff_pl.environments.space import prompt_means

# Sample number from which the pilot is drawn; no run's figures use numbers this high.
FIRST_PILOT = 2**30
# Numbers of clusters to try, and starts for each.
CLUSTERS, STARTS = (2, 3, 4, 5), 4
# Share of the steps that are guided: the first ones, where layout is decided.
GUIDED = 0.6
# Ridge of readings, relative to the mean variance of activations within clusters.
RIDGE = 0.1


@dataclass(frozen=True)
class Readings:
    """Linear readings of each prompt's clusters from the middle block, step by step.

    Attributes:
        weights: float32 ``[P, S, K, D]``, for S guided steps and at most K clusters.
        biases: float32 ``[P, S, K]``, minus infinity where a prompt has fewer clusters.
        shares: shares of each prompt's clusters in the pilot, float ``[P, K]``.
    """

    weights: Tensor
    biases: Tensor
    shares: Tensor

    def assigned(self, prompts: Tensor, places: Tensor) -> Tensor:
        """Return the cluster to draw each sample towards, a prompt's in turn, int64 ``[B]``.

        Args:
            prompts: number of each sample's prompt, int64 ``[B]``.
            places: number of each sample among its prompt's, int64 ``[B]``.
        """
        return places % self.biases[:, 0].isfinite().sum(1)[prompts]


class Guide:
    """A callback of the stock pipeline that moves latents towards assigned clusters at each step.

    A sample moves along the gradient of its cluster's log probability. The move has root mean
    square ``strength``, in units of the noise that the latent holds, times the probability that the
    sample is in another cluster: one that has arrived is left alone.

    Args:
        denoiser: denoiser of the pipeline.
        readings: readings of the clusters.
        strength: strength of the guidance; 0 changes nothing, not even rounding.
        condition: the encoded prompts, one row per sample.
        prompts: number of each sample's prompt, int64 ``[B]``.
        assigned: cluster of each sample, int64 ``[B]``.
    """

    def __init__(
        self,
        denoiser: FrozenDenoiser,
        readings: Readings,
        strength: float,
        condition: Condition,
        prompts: Tensor,
        assigned: Tensor,
    ) -> None:
        self.denoiser, self.readings, self.strength = denoiser, readings, strength
        self.condition, self.prompts, self.assigned = condition, prompts, assigned

    def __call__(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return latents for the next step, as diffusers' ``callback_on_step_end`` does."""
        if self.strength == 0 or step >= self.readings.weights.shape[1]:
            return {}
        following = pipe.scheduler.timesteps[step + 1]
        latents = tensors["latents"].detach()
        with torch.enable_grad():
            moved = latents.clone().requires_grad_()
            inside = self.log_probabilities(moved, following, step)
            (gradient,) = torch.autograd.grad(inside.sum(), moved)
        size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        outside = (1 - inside.detach().exp())[:, None, None, None]
        ratio = self.denoiser.process.signal_to_noise(following.long()[None].cpu())
        noise = float((1 / (1 + ratio)).sqrt())
        return {"latents": latents + self.strength * noise * outside * gradient / size}

    def log_probabilities(self, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """Compute the log probability that each sample is in its assigned cluster, ``[B]``."""
        seen = middle_activations(self.denoiser, latents, timestep, self.condition)
        weights, biases = (
            each[self.prompts, step].to(seen)
            for each in (self.readings.weights, self.readings.biases)
        )
        logits = (weights @ seen[:, :, None]).squeeze(2) + biases
        return log_softmax(logits, 1).gather(1, self.assigned.to(seen.device)[:, None]).squeeze(1)


def middle_activations(
    denoiser: FrozenDenoiser, latents: Tensor, timestep: Tensor, condition: Condition
) -> Tensor:
    """Average the output of a UNet's middle block at a step over quarters, float32 ``[B, 4 M]``."""
    timesteps = timestep.long().expand(len(latents))
    output = block_output(
        denoiser.network.mid_block, lambda: denoiser.predict(latents, timesteps, condition)
    )
    return adaptive_avg_pool2d(output.float(), 2).flatten(1)


@torch.no_grad()
def find_clusters(
    pipeline: Any,
    conditions: Conditions,
    *,
    per_prompt: int,
    seed: int,
    steps: int,
    guidance_scale: float,
    batch_size: int = 128,
) -> Readings:
    """Draw a pilot for each prompt, cluster it, and learn to read the clusters at guided steps.

    Args:
        pipeline: a loaded pipeline whose denoiser is a UNet.
        conditions: encodings of P prompts and, last, of the empty one.
        per_prompt: number of pilot samples per prompt.
        seed: seed of the pilot's noise.
        steps: number of steps with which images will be drawn.
        guidance_scale: guidance scale with which images will be drawn.
        batch_size: batch size of the pilot.
    """
    denoiser = frozen_denoiser(pipeline)
    features = BlockFeatures(denoiser, conditions.null, seed=seed)
    found = []
    for prompt in range(len(conditions) - 1):
        pilot: list[tuple[Tensor, Tensor]] = []
        for places in torch.arange(per_prompt).split(batch_size):
            condition = conditions[torch.full_like(places, prompt)]
            recorder = _Recorder(denoiser, condition, min(math.ceil(GUIDED * steps), steps - 1))
            indices = (FIRST_PILOT + prompt * per_prompt + places).tolist()
            latents = denoiser.draw(
                condition,
                conditions.null,
                *denoiser.initial_noise(indices, seed),
                steps=steps,
                guidance_scale=guidance_scale,
                output_type="latent",
                callback_on_step_end=recorder,
            )
            pilot.append((torch.stack(recorder.seen, 1).cpu(), features(latents).cpu()))
        seen, shown = (torch.cat(parts) for parts in zip(*pilot, strict=True))
        found.append((seen, cluster(shown, seed)))
    return _readings(found)


class _Recorder:
    """A callback of the stock pipeline that keeps the middle block's output at guided steps."""

    def __init__(self, denoiser: FrozenDenoiser, condition: Condition, guided: int) -> None:
        self.denoiser, self.condition, self.guided = denoiser, condition, guided
        self.seen: list[Tensor] = []

    def __call__(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if step < self.guided:
            following = pipe.scheduler.timesteps[step + 1]
            latents = tensors["latents"]
            seen = middle_activations(self.denoiser, latents, following, self.condition)
            self.seen.append(seen)
        return {}


def _readings(found: Sequence[tuple[Tensor, Tensor]]) -> Readings:
    most = max(int(clusters.max()) + 1 for _, clusters in found)
    steps, width = found[0][0].shape[1:]
    weights = torch.zeros(len(found), steps, most, width)
    biases = torch.full((len(found), steps, most), -math.inf)
    shares = torch.zeros(len(found), most)
    for prompt, (seen, clusters) in enumerate(found):
        count = int(clusters.max()) + 1
        shares[prompt] = clusters.bincount(minlength=most) / len(clusters)
        for step in range(steps):
            weights[prompt, step, :count], biases[prompt, step, :count] = reading(
                seen[:, step], clusters
            )
    return Readings(weights, biases, shares)


def cluster(features: Tensor, seed: int) -> Tensor:
    """Cluster one prompt's images by k-means, into as many clusters as give the best silhouette.

    Args:
        features: ``[N, D]``.
        seed: seed of the starts.

    Returns:
        cluster of each image, int64 ``[N]``.
    """
    values = features.double()
    values = (values - values.mean(0)) / values.std(0).clamp(min=1e-9)
    distances = torch.cdist(values, values)
    tried = []
    for count in CLUSTERS:
        starts = [
            kmeans_memberships(values, count, generator(seed, "clusters", count, start)).argmax(1)
            for start in range(STARTS)
        ]
        best = min(starts, key=lambda c: _scatter(values, c))
        tried.append(best.unique(return_inverse=True)[1])
    return max(tried, key=lambda clusters: silhouette(distances, clusters))


def _scatter(values: Tensor, clusters: Tensor) -> float:
    return float((values - prompt_means(values, clusters)[clusters]).square().sum())


def silhouette(distances: Tensor, clusters: Tensor) -> float:
    """Compute the mean silhouette of clusters (Rousseeuw 1987); 0 for an image alone in its own.

    Args:
        distances: ``[N, N]``.
        clusters: int64 ``[N]``, without gaps.
    """
    sizes = clusters.bincount()
    if len(sizes) < 2:
        return -1.0
    own = nn.functional.one_hot(clusters).bool()
    sums = distances @ own.to(distances)
    within = sums[own] / (sizes[clusters] - 1).clamp(min=1)
    between = (sums / sizes).masked_fill(own, math.inf).min(1)[0]
    widths = (between - within) / torch.maximum(within, between).clamp(min=1e-12)
    return float(widths.masked_fill(sizes[clusters] == 1, 0.0).mean())


def reading(seen: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Compute linear discriminants of clusters, all taken to be equally large.

    Args:
        seen: activations ``[N, D]``.
        clusters: int64 ``[N]``, without gaps.

    Returns:
        float32 weights ``[K, D]`` and biases ``[K]``.
    """
    values = seen.double().cpu()
    centre = values.mean(0)
    means = prompt_means(values - centre, clusters)
    residuals = values - centre - means[clusters]
    covariance = residuals.T @ residuals / len(values)
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    covariance = covariance + ridge * torch.eye(len(covariance), dtype=torch.float64)
    weights = torch.linalg.solve(covariance, means.T).T
    biases = -0.5 * (weights * means).sum(1) - weights @ centre
    return weights.float(), biases.float()
