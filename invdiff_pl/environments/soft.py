"""Soft environments: mixtures of one or several scores, and the reference's gradient ascent."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.backbones.draws import generator
from invdiff_pl.environments.mixture import SharedMixture, fit_mixture

# Of the ascent, as far as METHOD tells; rate and weight of the least mass are not published.
EPOCHS = 500
LEARNING_RATE = 0.01
LEAST_WEIGHT = 1.0
VECTOR_ITERATIONS = 60
VECTOR_RIDGE = 0.05


def mixture_memberships(scores: Tensor, prompts: Tensor, assignments: Tensor) -> Tensor:
    """Memberships under a mixture of the scores that all prompts share.

    Args:
        scores: ``[N]``.
        prompts: int64 ``[N]``.
        assignments: int64 ``[N]`` to start from.

    Returns:
        float32 ``[N, G]``, rows with sum 1.
    """
    return _fit(scores, prompts, assignments).memberships[:, 0].float()


def choose_groups(
    scores: Tensor, prompts: Tensor, partitions: dict[int, Tensor]
) -> tuple[int, dict[int, float]]:
    """The number of groups that tells the scores best, by the integrated completed likelihood.

    ``ICL = log-likelihood - entropy of the memberships - parameters / 2 * log N`` (Biernacki,
    Celeux and Govaert 2000): unlike BIC it does not count a skewed group as two that overlap.

    Args:
        scores: ``[N]``, comparable between prompts.
        prompts: int64 ``[N]``.
        partitions: by number of groups, at least 2, the assignments ``[N]`` to start from.

    Returns:
        the number, and the criterion of each.
    """
    prompt_count = int(prompts.max()) + 1
    criteria = {}
    for groups, assignments in partitions.items():
        fitted = _fit(scores, prompts, assignments)
        entropy = -torch.special.xlogy(fitted.memberships, fitted.memberships).sum()
        # Shares of each prompt, distances of means, and one variance.
        parameters = prompt_count * (groups - 1) + (groups - 1) + 1
        penalty = parameters / 2 * torch.tensor(float(len(scores))).log()
        criteria[groups] = float(fitted.log_likelihood[0] - entropy - penalty)
    return max(criteria, key=criteria.__getitem__), criteria


def _fit(scores: Tensor, prompts: Tensor, assignments: Tensor) -> SharedMixture:
    return fit_mixture(scores[:, None], prompts, one_hot(assignments).double()[:, None])


def vector_memberships(table: Tensor, prompts: Tensor, assignments: Tensor) -> Tensor:
    """Memberships under a Gaussian mixture of several scores, each prompt by itself.

    The groups of a prompt share one covariance, with a ridge; a prompt with fewer than two images
    a score keeps its assignments.

    Args:
        table: standardised ``[N, D]``.
        prompts: int64 ``[N]``.
        assignments: int64 ``[N]`` to start from.

    Returns:
        float32 ``[N, G]``, rows with sum 1.
    """
    memberships = one_hot(assignments).double()
    width = table.shape[1]
    ridge = VECTOR_RIDGE * torch.eye(width, dtype=torch.float64)
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        values, members = table[rows].double(), memberships[rows]
        if len(rows) < 2 * width or (members.sum(0) == 0).any():
            continue
        for _ in range(VECTOR_ITERATIONS):
            masses = members.sum(0)
            means = members.T @ values / masses[:, None]
            square = values.T @ values - means.T @ (masses[:, None] * means)
            precision = torch.linalg.inv(square / len(rows) + ridge)
            offsets = values[:, None] - means
            distances = torch.einsum("ngd,de,nge->ng", offsets, precision, offsets)
            members = (masses.log() - 0.5 * distances).softmax(1)
        memberships[rows] = members
    return memberships.float()


def gradient_memberships(scores: Tensor, groups: int, seed: int = 0) -> Tensor:
    """The reference's ascent of the spread of group means, over all images at once.

    Adam on a dense ``[N, G]`` matrix of memberships from random ones, with the loss
    ``-std(L_g) - w min(l q)``; after each step rows are clamped to [0, 1] and made to sum to 1.
    For comparison: :func:`invdiff_pl.environments.partition.partition` finds the maximum exactly.

    Args:
        scores: ``[N]``.
        groups: G, at least 2.
        seed: of the memberships at the start.

    Returns:
        float32 ``[N, G]``, rows with sum 1.
    """
    values = scores.float()
    members = torch.rand(len(values), groups, generator=generator(seed, "memberships"))
    members = members / members.sum(1, keepdim=True)
    with torch.inference_mode(False), torch.enable_grad():
        members = members.clone().requires_grad_(True)
        values = values.clone()
        optimizer = torch.optim.Adam([members], lr=LEARNING_RATE)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            weighted = values[:, None] * members
            means = weighted.sum(0) / members.sum(0).clamp(min=1e-9)
            (-means.std() - LEAST_WEIGHT * weighted.min()).backward()
            optimizer.step()
            with torch.no_grad():
                members.clamp_(1e-9, 1)
                members /= members.sum(1, keepdim=True)
    return members.detach()
