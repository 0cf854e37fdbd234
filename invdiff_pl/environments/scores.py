"""One score an image from its table of losses: high where the frozen model finds it unusual.

A table holds the denoising loss of every image at T timesteps under R noises, the same timesteps
and noises for all images, so that differences down a column are differences between images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.environments.cuts import best_cut, prompt_means, upper_groups
from invdiff_pl.environments.evidence import group_likeness
from invdiff_pl.environments.pursuit import HiddenAttribute, hidden_attributes
from invdiff_pl.environments.refine import Refined, by_group, discriminant, refine
from invdiff_pl.utils.names import require_name


@dataclass(frozen=True)
class Losses:
    """Denoising losses of N images at T timesteps under R common noises.

    Attributes:
        own: float32 ``[N, T, R']``, given the image's own prompt, under the first R' noises.
        null: float32 ``[N, T, R]`` given the empty prompt.
    """

    own: Tensor
    null: Tensor

    def half(self, first: int) -> "Losses":
        """Those of every other noise, from number ``first`` (0 or 1) on.

        Where there is one noise only under the own prompt, both halves hold it.
        """
        own = self.own[..., first::2] if self.own.shape[2] > 1 else self.own
        return Losses(own, self.null[..., first::2])


# A prompt's own variance counts as if this many pooled images were added.
PRIOR_IMAGES = 10.0
# Of a discriminant pooled over prompts, against readings' unit variance.
SMALL_RIDGE = 1e-3


def standardise(losses: Tensor, prompts: Tensor) -> Tensor:
    """Losses minus the mean and over the standard deviation of their (prompt, timestep, draw).

    The variance of a prompt with few images is drawn towards the pooled one (empirical Bayes), so
    that three images are never divided by the standard deviation of three images.

    Args:
        losses: ``[N, T, R]``.
        prompts: int64 ``[N]``.

    Returns:
        float64 ``[N, T, R]``; 0 where the losses do not vary.
    """
    values = losses.double()
    counts = prompts.bincount().double().clamp(min=1)[:, None, None]
    share = counts / (counts + PRIOR_IMAGES)

    residuals = values - prompt_means(values, prompts)[prompts]
    spread = share * prompt_means(residuals.square(), prompts) + (
        1 - share
    ) * residuals.square().mean(0)
    deviation = spread.sqrt()[prompts]
    smallest = torch.finfo(torch.float64).tiny
    return torch.where(deviation > 1e-12, residuals / deviation.clamp(min=smallest), 0.0)


def timestep_weights(table: Tensor, prompts: Tensor) -> Tensor:
    """How much each timestep should count, told without labels.

    A timestep counts by how much more clearly than a normal distribution its values fall into two
    groups within the prompts, and by how well the values under one half of the noises repeat those
    under the other.

    Args:
        table: standardised values ``[N, T, R]``.
        prompts: int64 ``[N]``.

    Returns:
        float64 ``[T]``, at least 0, with sum 1; even if no timestep separates anything.
    """
    table = table.double()
    averaged = table.mean(2)
    excess = torch.zeros(table.shape[1], dtype=torch.float64)
    for prompt in prompts.unique().tolist():
        chosen = averaged[prompts == prompt]
        share = len(chosen) / len(prompts)
        excess += share * best_cut(chosen).clarity.clamp(min=0)
    weights = excess * _reliability(table) if table.shape[2] > 1 else excess
    if weights.sum() == 0:
        weights = torch.ones_like(weights)
    return weights / weights.sum()


def orient(table: Tensor, prompts: Tensor) -> Tensor:
    """Turn each (prompt, timestep) so that its long tail, the smaller group, points up.

    With the noise, the contrast of images against the bias changes its sign: where the noisy image
    still shows the scene they are the easier ones.

    Args:
        table: standardised values ``[N, T, R]``.
        prompts: int64 ``[N]``.

    Returns:
        of the same shape.
    """
    cubes = table.mean(2) ** 3
    sums = cubes.new_zeros((int(prompts.max()) + 1, table.shape[1])).index_add_(0, prompts, cubes)
    signs = torch.where(sums < 0, -1.0, 1.0)
    return table * signs[prompts][..., None]


def _reliability(table: Tensor) -> Tensor:
    """Correlation between the two halves of the noises, by timestep, at least 0."""
    first, second = table[..., ::2].mean(2), table[..., 1::2].mean(2)
    first, second = first - first.mean(0), second - second.mean(0)
    scale = (first.square().sum(0) * second.square().sum(0)).sqrt()
    correlation = (first * second).sum(0) / scale.clamp(min=torch.finfo(torch.float64).tiny)
    return correlation.clamp(min=0)


def _raw_mean(losses: Losses, prompts: Tensor) -> Tensor:
    return losses.own.double().mean((1, 2))


def _standardised(losses: Losses, prompts: Tensor) -> Tensor:
    return standardise(losses.own, prompts).mean((1, 2))


def _separation_weighted(losses: Losses, prompts: Tensor) -> Tensor:
    table = standardise(losses.own, prompts)
    return table.mean(2) @ timestep_weights(table, prompts)


def contrast_table(losses: Losses, prompts: Tensor) -> Tensor:
    """Loss under the own prompt less that under the empty one, standardised and oriented.

    The difference drops what makes an image hard under any prompt, such as texture, and keeps what
    its prompt makes more or less likely.

    Returns:
        float64 ``[N, T, R]``.
    """
    null = losses.null[..., : losses.own.shape[2]]
    return orient(standardise(losses.own.double() - null.double(), prompts), prompts)


def _prompt_contrast(losses: Losses, prompts: Tensor) -> Tensor:
    return contrast_table(losses, prompts).mean((1, 2))


def _weighted_contrast(losses: Losses, prompts: Tensor) -> Tensor:
    table = contrast_table(losses, prompts)
    return table.mean(2) @ timestep_weights(table, prompts)


def _refined_contrast(losses: Losses, prompts: Tensor) -> Tensor:
    contrast = contrast_table(losses, prompts)
    return refine(_columns(losses, prompts), _half_weighted(contrast, prompts), prompts).scores


def _half_weighted(contrast: Tensor, prompts: Tensor) -> Tensor:
    """A :func:`contrast_table` over its timesteps, half evenly and half by their weights."""
    # Half even: where one timestep alone misleads, the others outvote it.
    weights = (timestep_weights(contrast, prompts) + 1 / contrast.shape[1]) / 2
    return contrast.mean(2) @ weights


def _columns(losses: Losses, prompts: Tensor) -> Tensor:
    """All losses, standardised, ``[N, D]``."""
    columns = [standardise(part, prompts).flatten(1) for part in (losses.own, losses.null)]
    return torch.cat(columns, dim=1)


def _prompt_pursuit(losses: Losses, prompts: Tensor) -> Tensor:
    return by_group(attribute_scores(losses, prompts)[1].scores, prompts)


def attribute_scores(
    losses: Losses, prompts: Tensor, families: Tensor | None = None
) -> tuple[HiddenAttribute | None, Refined]:
    """The hidden attribute that the losses under the empty prompt show, and refined scores.

    Of :func:`hidden_attributes`, that of most evidence times the likeness of its groups to those
    where each prompt's own refinement ends: an attribute of all prompts is found there again.

    Args:
        losses: of N images.
        prompts: int64 ``[N]``.
        families: of prompts that are parts of one, see :func:`hidden_attributes`.

    Returns:
        what was found, and its scores of N images, refined prompt by prompt with all losses;
        those of ``refined_contrast`` where there is nothing to compare between prompts.
    """
    contrast, columns = contrast_table(losses, prompts), _columns(losses, prompts)
    refined = refine(columns, _half_weighted(contrast, prompts), prompts)
    suggestions = torch.stack([contrast.mean((1, 2)), refined.scores], dim=1)
    readings = columns[:, losses.own[0].numel() :]
    rivals = hidden_attributes(readings, prompts, suggestions=suggestions, families=families)
    if not rivals:
        return None, refined
    told = [(rival, refine(columns, rival.scores, prompts)) for rival in rivals]

    def merit(pair: tuple[HiddenAttribute, Refined]) -> float:
        found, ends = pair[0], pair[1].ends
        return found.evidence * group_likeness(found.scores, ends, prompts)

    return max(told, key=merit)


def _reference(losses: Losses, prompts: Tensor) -> Tensor:
    """One random timestep and noise an image, as the reference scores, with the right target."""
    flat = losses.own.double().flatten(1)
    columns = torch.randint(flat.shape[1], (len(flat),), generator=generator(0, "reference"))
    return flat.gather(1, columns[:, None]).squeeze(1)


SCORES: dict[str, Callable[[Losses, Tensor], Tensor]] = {
    "raw_mean": _raw_mean,
    "standardised": _standardised,
    "separation_weighted": _separation_weighted,
    "prompt_contrast": _prompt_contrast,
    "weighted_contrast": _weighted_contrast,
    "refined_contrast": _refined_contrast,
    "prompt_pursuit": _prompt_pursuit,
    "reference": _reference,
}


def score(losses: Losses, prompts: Tensor, name: str) -> Tensor:
    """One score an image.

    Args:
        losses: tables of N images.
        prompts: int64 ``[N]``.
        name: ``raw_mean`` of the losses; ``standardised`` within (prompt, timestep);
            ``separation_weighted``, the same with :func:`timestep_weights`; ``prompt_contrast``,
            the mean of :func:`contrast_table`; ``weighted_contrast``, the same with
            :func:`timestep_weights`; ``refined_contrast``, the best linear combination of
            all losses, found from there by cutting the scores in two and taking the discriminant
            of the two parts in turn, see :func:`refine`; ``prompt_pursuit``, the same from the
            :func:`hidden_attributes` that the losses under the empty prompt show; or
            ``reference``, one random timestep.

    Returns:
        float64 ``[N]``.

    Raises:
        InvDiffError: if there is no score of that name.
    """
    require_name("score", name, tuple(SCORES))
    return SCORES[name](losses, prompts)


def retold(losses: Losses, prompts: Tensor, scores: Tensor) -> Tensor:
    """The scores as fewer losses tell them, given the groups that they fall into.

    The groups' discriminant, pooled over prompts, and refined by all of these losses.

    Args:
        losses: of N images, under some of the noises.
        prompts: int64 ``[N]``.
        scores: ``[N]``, turned alike in all prompts.

    Returns:
        float64 ``[N]``, comparable between prompts.
    """
    readings = standardise(losses.null, prompts).flatten(1)
    groups = upper_groups(scores, prompts)
    upper = groups.double()
    covariance = readings.T @ readings / len(readings)
    covariance.diagonal().add_(SMALL_RIDGE)
    towards = readings.T @ (upper - prompt_means(upper, prompts)[prompts])
    pooled = readings @ torch.linalg.solve(covariance, towards)
    return by_group(
        discriminant(_columns(losses, prompts), pooled, prompts, groups.long()), prompts
    )


def split_half_rank_correlation(
    losses: Losses, prompts: Tensor, name: str, pursued: Tensor | None = None
) -> float | None:
    """Spearman correlation of the scores from two halves of the noises.

    Args:
        losses: of N images.
        prompts: int64 ``[N]``.
        name: of the score.
        pursued: those of :func:`attribute_scores`, if that is the name and they are known. Then
            nothing is pursued again, see :func:`retold`.

    Returns:
        ``None`` with one noise.
    """
    if losses.null.shape[2] < 2:
        return None
    if pursued is None:
        halves = [score(losses.half(first), prompts, name) for first in (0, 1)]
    else:
        halves = [retold(losses.half(first), prompts, pursued) for first in (0, 1)]
    ranks = torch.stack([half.argsort().argsort().double() for half in halves])
    return float(torch.corrcoef(ranks)[0, 1])
