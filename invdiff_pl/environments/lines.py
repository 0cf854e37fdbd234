"""Two values along the lines that tell them apart, for many fits at once.

All that matters about an image is ``y = z w``, ``w = Sigma^-1 delta``. Along this line, the
distance between the values equals the variance within them: ``distance = delta Sigma^-1 delta'``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from invdiff_pl.environments.shared_values import LEAST_SHARE, ROUNDS, Fit, towards_mean
from invdiff_pl.environments.space import Space, prompt_means

_WIDTH_ROUNDS = 10


@dataclass(frozen=True)
class Lines:
    """N images as S fits of two values see them.

    Attributes:
        prompts: int64 ``[N]``, without gaps.
        line: y, of mean 0 in each prompt, ``[N, S]``.
        distance: distance between the values along it, ``[S]``.
        members: probability of the second value, ``[N, S]``.
        shares: shares of the second value, ``[P, S]``.
    """

    prompts: Tensor
    line: Tensor
    distance: Tensor
    members: Tensor
    shares: Tensor

    @classmethod
    def of(cls, fits: Sequence[Fit], space: Space) -> "Lines":
        """Build the lines of fits in a space of the same images."""
        apart = torch.stack([each.delta[1] - each.delta[0] for each in fits], dim=1)
        directions = torch.stack(
            [each.precision @ across for each, across in zip(fits, apart.T, strict=True)], dim=1
        )
        return cls(
            space.prompts,
            space.values @ directions,
            (apart * directions).sum(0).clamp(min=1e-12),
            torch.stack([each.memberships[:, 1] for each in fits], dim=1),
            torch.stack([each.shares[:, 1] for each in fits], dim=1),
        )

    def gains(self, parts: Tensor) -> Tensor:
        """Return the log-likelihood per image of two values over one, by part, ``[parts, S]``.

        Both are fitted with the part's own width.
        """
        line, prompts, distance, members = self.line, self.prompts, self.distance, self.members
        for _ in range(_WIDTH_ROUNDS):
            shares = prompt_means(members, prompts).clamp(LEAST_SHARE, 1 - LEAST_SHARE)
            low = line + (shares * distance)[prompts]
            squares = (1 - members) * low.square() + members * (low - distance).square()
            widths = prompt_means(squares, parts).clamp(min=1e-12)[parts]
            members = torch.sigmoid(odds_of(low, prompts, distance, shares, widths))
        two = log_densities(low, prompts, distance, shares, widths)
        own = prompt_means(line, parts)
        own = prompt_means((line - own[parts]).square(), parts).clamp(min=1e-12)
        one = -0.5 * (1 + own.log())
        found = prompt_means(two - 0.5 * widths.log(), parts) - one
        # Less what one more parameter adds by chance.
        return found - 1 / parts.bincount()[:, None]

    def ratios(self) -> Tensor:
        """Return twice the log-likelihood of own over equal shares, at least 0, ``[S]``."""
        own, equal = (self._explained(equal) for equal in (False, True))
        return (2 * (own - equal)).clamp(min=0)

    def _explained(self, equal: bool) -> Tensor:
        """Return the log-likelihood of all images ``[S]``, up to a constant, at the best shares."""
        prompts, distance = self.prompts, self.distance
        sizes = prompts.bincount()[:, None].to(self.line)
        means = self.shares
        expected = means.mean(0).expand_as(means) if equal else means
        moving = torch.ones_like(distance, dtype=torch.bool)
        for _ in range(ROUNDS):
            low = self.line + (means * distance)[prompts]
            members = torch.sigmoid(odds_of(low, prompts, distance, expected))
            read = prompt_means(members, prompts)
            # Each fit stops on its own, so that where it stops does not depend on the others.
            moving &= (read - means).abs().amax(0) >= 1e-4
            if not moving.any():
                break
            means = torch.where(moving, read, means)
            mean = (means * sizes).sum(0) / sizes.sum()
            expected = mean.expand_as(means) if equal else towards_mean(means, sizes)
            expected = expected.clamp(LEAST_SHARE, 1 - LEAST_SHARE)
        low = self.line + (means * distance)[prompts]
        return log_densities(low, prompts, distance, expected).sum(0)


def odds_of(
    low: Tensor, prompts: Tensor, distance: Tensor, shares: Tensor, widths: Tensor | None = None
) -> Tensor:
    """Return the logarithm of the upper over the lower value's density, ``[N, S]``.

    Args:
        low: positions along the lines, measured from the lower value, ``[N, S]``.
        prompts: int64 ``[N]``.
        distance: distance between the values, ``[S]``.
        shares: shares of the upper value, in (0, 1), ``[P, S]``.
        widths: variances of the values, ``[N, S]``; as large as the distance if not given.
    """
    pull = low - distance / 2
    if widths is not None:
        pull = pull * (distance / widths)
    return pull + torch.logit(shares)[prompts]


def log_densities(
    low: Tensor, prompts: Tensor, distance: Tensor, shares: Tensor, widths: Tensor | None = None
) -> Tensor:
    """Return log-densities ``[N, S]``, but for half of log(2 pi widths); see :func:`odds_of`."""
    odds = odds_of(low, prompts, distance, shares, widths)
    variances = distance if widths is None else widths
    lower = torch.log1p(-shares)[prompts] - 0.5 * low.square() / variances
    # softplus is the identity above its threshold, to within e^-threshold.
    return lower + softplus(odds, threshold=40)
