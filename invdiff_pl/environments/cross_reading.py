"""Shares of the values in each part of the images, as implied by all the other parts.

If a prompt's place is mistaken, as though all its images had one value, their differences count as
noise, and the direction that tells the values apart turns away from them until they no longer show.
Such a fit agrees with itself. So each part is read with what the values look like in the images of
the other parts: given their ``delta`` and ``Sigma``, only the shares and places of the part's
prompts are left to find.
"""

import torch
from torch import Tensor

from invdiff_pl.environments.shared_values import ROUNDS, maximised, moderated
from invdiff_pl.environments.space import Space, prompt_means


def cross_read_shares(space: Space, members: Tensor, parts: Tensor) -> Tensor:
    """Read the shares of the values in each prompt by the other parts: float64 ``[P, K]``.

    Args:
        space: space of the images.
        members: probabilities of the values, float64 ``[N, K]``.
        parts: part of each image, int64 ``[N]``, of two or more; a prompt's images share one part.
    """
    prompts = space.prompts
    pulls, products = _of_others(space, members, parts)
    lengths = torch.diagonal(products, dim1=1, dim2=2)
    sizes = prompts.bincount()[:, None].to(pulls)
    means = prompt_means(members, prompts)
    for _ in range(ROUNDS):
        # Images have mean 0 in a prompt, so its place is - sum_k mean_k delta_k.
        places = (products @ means[:, :, None]).squeeze(2)
        logits = moderated(means, sizes).log() + places - lengths / 2
        read = prompt_means((logits[prompts] + pulls).softmax(1), prompts)
        moved = (read - means).abs().max()
        means = read
        if moved < 1e-4:
            break
    return means


def _of_others(space: Space, members: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Fit what values look like in the other parts, as far as reading an image needs it.

    Returns:
        ``delta Sigma^-1 z`` for each image, ``[N, K]``, and ``delta Sigma^-1 delta'`` for each
        prompt, ``[P, K, K]``.
    """
    values, prompts = space.values, space.prompts
    own, sizes = prompt_means(members, prompts), prompts.bincount().to(values)
    part_of = torch.zeros(len(sizes), dtype=torch.long).scatter_(0, prompts, parts)
    pulls = torch.empty_like(members)
    products = members.new_empty(len(sizes), members.shape[1], members.shape[1])
    for part in range(int(parts.max()) + 1):
        rows, there = parts != part, part_of != part
        delta, precision = maximised(values[rows], members[rows], own[there], sizes[there, None])
        pulled = delta @ precision
        pulls[~rows] = values[~rows] @ pulled.T
        products[~there] = pulled @ delta.T
    return pulls, products
