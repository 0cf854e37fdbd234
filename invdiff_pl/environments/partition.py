"""Environments as in the InvDiff paper: the partition that maximises the spread of losses.

Each image has one score, its mean denoising loss. The best partition of a prompt's images is then a
cut of the sorted scores, found exactly; the paper climbs to it by gradients (arXiv 2412.08480, and
EIIL, arXiv 2010.07249, before it). It is kept for comparison: it finds a cut in any images, and
does not test whether there is a bias.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.environments.hidden_attribute import HiddenAttribute
from invdiff_pl.environments.space import prompt_means

# Least share of a prompt's images in either environment.
LEAST_SHARE = 0.01


class LossPartition(HiddenAttribute):
    """Environments by losses, numbered by rising loss in each prompt separately."""


def partition_attribute(losses: Tensor, prompts: Tensor) -> LossPartition:
    """Partition images by their losses, as a hidden attribute without a test.

    Args:
        losses: ``[N, D]``, of which the mean over D counts.
        prompts: int64 ``[N]``.

    Returns:
        two groups, of low and high losses in each prompt; the conflict is the loss minus the
        prompt's mean.

    Example:
        >>> losses = torch.tensor([[1.0], [1.1], [0.9], [3.0]])
        >>> partition_attribute(losses, torch.zeros(4).long()).memberships.argmax(1).tolist()
        [0, 0, 0, 1]
    """
    scores = losses.double().mean(1)
    memberships = one_hot(partition(scores, prompts), 2).double()
    return LossPartition(
        memberships=memberships,
        shares=prompt_means(memberships, prompts),
        conflict=scores - prompt_means(scores, prompts)[prompts],
        evidence=0.0,
        gain=0.0,
        alignment=0.0,
        p_value=1.0,
        verdict="untestable",
        reason="a partition of losses does not test whether there is a bias.",
    )


def partition(scores: Tensor, prompts: Tensor) -> Tensor:
    """Cut each prompt's images in two, maximising the variance between the parts' mean scores.

    Args:
        scores: ``[N]``.
        prompts: int64 ``[N]``.

    Returns:
        int64 ``[N]``, 1 above the cut; a prompt of one image is left whole.
    """
    found = torch.zeros(len(scores), dtype=torch.int64)
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        values, order = scores[rows].double().sort(stable=True)
        least = max(1, -int(-LEAST_SHARE * len(rows) // 1))
        if len(rows) < 2 * least:
            continue
        sizes = torch.arange(least, len(rows) - least + 1)
        sums = (values - values.mean()).cumsum(0)[sizes - 1]
        cut = int(sizes[(sums.square() / (sizes * (len(rows) - sizes))).argmax()])
        found[rows[order[cut:]]] = 1
    return found
