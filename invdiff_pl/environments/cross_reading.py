"""What shares parts of the images have, as all the other parts tell them.

Where a prompt's place is mistaken, as if all its images had one value, what they differ in counts
as noise, and what tells the values apart turns away from it until it no longer shows there. Such a
fit agrees with itself. So each part is read with what values look like in the images of the others:
given their ``delta`` and ``Sigma``, all that is left to find are shares and places of its prompts.
"""

import torch
from torch import Tensor

from invdiff_pl.environments.shared_values import ROUNDS, maximised, moderated
from invdiff_pl.environments.space import Space, prompt_means


def cross_read_shares(space: Space, members: Tensor, parts: Tensor) -> Tensor:
    """Shares of the values in each prompt, as the other parts tell them: float64 ``[P, K]``.

    Args:
        space: of the images.
        members: probabilities of the values, float64 ``[N, K]``.
        parts: of the images, int64 ``[N]``, two or more; images of a prompt are in the same.
    """
    prompts = space.prompts
    pulls, products = _of_others(space, members, parts)
    lengths = torch.diagonal(products, dim1=1, dim2=2)
    sizes = prompts.bincount()[:, None].to(pulls)
    means = prompt_means(members, prompts)
    for _ in range(ROUNDS):
        # Values have mean 0 in a prompt, so that it is at - sum_k mean_k delta_k.
        places = (products @ means[:, :, None]).squeeze(2)
        logits = moderated(means, sizes).log() + places - lengths / 2
        read = prompt_means((logits[prompts] + pulls).softmax(1), prompts)
        moved = (read - means).abs().max()
        means = read
        if moved < 1e-4:
            break
    return means


def _of_others(space: Space, members: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """What values look like in the other parts, as far as reading an image needs it.

    Returns:
        ``delta Sigma^-1 z`` of images ``[N, K]`` and ``delta Sigma^-1 delta'`` of prompts
        ``[P, K, K]``.
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
