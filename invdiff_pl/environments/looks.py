"""Whether prompts differ in how often they show an attribute, or in how it looks in them.

Along the line ``y`` that tells two values of an attribute apart, prompts' images may be distributed
differently for two reasons. Either they show the same things in *shares* of their own,

    y_i ~ sum_k pi_pk N(y_i - m_p; mu_k, s^2),

or the same shares of things that have *looks* of their own: what the prompt names moves, stretches
and bends the line,

    t_i ~ sum_k pi_k N(t_i; mu_k, s^2),    t = sinh(asinh((y - m_p) / b_p) - c_p),

which is the sinh-arcsinh transformation (Jones and Pewsey, Biometrika 96, 2009): smooth and
increasing, with a scale and a skewness of each prompt's own. It makes a heap skewed, but does not
move images from one heap to another. Both are fitted by maximum likelihood with 2 to 5 heaps, as
many as the Bayesian information criterion likes, and compared by it.

Where nearly all images of each prompt are in one heap, looks may explain as much as shares do: each
prompt's line hides in the main heap what is rare in the other. So this is no test of a bias.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.environments.space import prompt_means

_HEAPS = (2, 3, 4, 5)
_STEPS = 200
_LEAST_WIDTH = 0.05
# A prompt of few images would bend its line to fit them: its scale and skewness are drawn to those
# of the others, with this standard deviation.
_BEND = 0.5


@dataclass(frozen=True)
class _Explanation:
    """Parameters of either explanation, all float64 with gradients.

    Attributes:
        heaps: places of the heaps, ``[K]``.
        log_width: of the heaps, ``[]``.
        weights: logarithms of their shares up to a constant, ``[P, K]``; ``[1, K]`` of looks.
        places: of the prompts, ``[P]``.
        bends: logarithm of the scale, and skewness, ``[2, P]``; none for shares.
    """

    heaps: Tensor
    log_width: Tensor
    weights: Tensor
    places: Tensor
    bends: Tensor | None

    def parameters(self) -> list[Tensor]:
        """What is fitted."""
        every = [self.heaps, self.log_width, self.weights, self.places]
        return every if self.bends is None else [*every, self.bends]

    def log_likelihood(self, line: Tensor, prompts: Tensor) -> Tensor:
        """Natural logarithm of the likelihood of all images, with the prior of bends."""
        straight = line - self.places[prompts]
        stretched = torch.zeros_like(straight)
        prior = line.new_zeros(())
        if self.bends is not None:
            log_scale, skewness = self.bends[:, prompts]
            scaled = straight / log_scale.exp()
            angle = scaled.asinh() - skewness
            straight = angle.sinh()
            stretched = angle.cosh().log() - 0.5 * scaled.square().log1p() - log_scale
            prior = -0.5 * (self.bends / _BEND).square().sum()
        width = self.log_width.exp() + _LEAST_WIDTH
        shares = self.weights.log_softmax(1)
        shares = shares[prompts] if len(shares) > 1 else shares
        heaps = shares - 0.5 * ((straight[:, None] - self.heaps) / width).square() - width.log()
        constant = 0.5 * math.log(2 * math.pi) * len(line)
        return (heaps.logsumexp(1) + stretched).sum() - constant + prior

    def criterion(self, line: Tensor, prompts: Tensor) -> float:
        """Bayesian information criterion after fitting; a prompt's parameters by its own images."""
        every = self.parameters()
        optimizer = torch.optim.LBFGS(every, max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -self.log_likelihood(line, prompts) / len(line)
            value.backward()
            return value

        optimizer.step(loss)
        heaps, prompts_log_sizes = len(self.heaps), prompts.bincount().double().log()
        own = heaps if self.bends is None else 3  # shares and place, or place, scale and skewness
        shared = heaps + 1 + (0 if self.bends is None else heaps - 1)
        penalty = own * float(prompts_log_sizes.sum()) + shared * math.log(len(line))
        return penalty - 2 * float(self.log_likelihood(line, prompts).detach())


def shares_over_looks(line: Tensor, prompts: Tensor, places: Tensor) -> float:
    """How much better own shares explain prompts' distributions along a line than own looks.

    Args:
        line: float64 ``[N]``, what tells the values of an attribute apart.
        prompts: int64 ``[N]``, without gaps.
        places: of the prompts along the line where shares explain it, float64 ``[P]``.

    Returns:
        half the difference of the criteria, in nats of all images: positive where shares explain
        more, negative where looks do.

    Example:
        >>> import torch
        >>> source = torch.Generator().manual_seed(0)
        >>> prompts = torch.arange(2000) % 2
        >>> dark = torch.rand(2000, generator=source) < torch.tensor([0.2, 0.8])[prompts]
        >>> noise = torch.randn(2000, generator=source).double()
        >>> shares_over_looks(4 * dark + noise, prompts, torch.zeros(2).double()) > 0
        True
    """
    deviation = (line - places[prompts]).std().clamp(min=1e-12)
    line, places = line / deviation, places / deviation
    shares = min(_shares(line, prompts, places, heaps).criterion(line, prompts) for heaps in _HEAPS)
    looks = min(_looks(line, prompts, heaps).criterion(line, prompts) for heaps in _HEAPS)
    return (looks - shares) / 2


def _shares(line: Tensor, prompts: Tensor, places: Tensor, heaps: int) -> _Explanation:
    """Where the fit of own shares starts: at quantiles, counted in each prompt."""
    straight = line - places[prompts]
    middles = _quantiles(straight, heaps)
    nearest = (straight[:, None] - middles).abs().argmin(1)
    counts = torch.zeros(len(places), heaps, dtype=line.dtype)
    counts.index_put_((prompts, nearest), torch.ones_like(line), accumulate=True)
    return _explanation(middles, (counts + 1).log(), places, None)


def _looks(line: Tensor, prompts: Tensor, heaps: int) -> _Explanation:
    """Where the fit of own looks starts: at straight lines, the prompts' means on each other."""
    places = prompt_means(line, prompts)
    weights, bends = line.new_zeros(1, heaps), line.new_zeros(2, len(places))
    return _explanation(_quantiles(line - places[prompts], heaps), weights, places, bends)


def _quantiles(line: Tensor, heaps: int) -> Tensor:
    return line.quantile((torch.arange(heaps, dtype=line.dtype) + 0.5) / heaps)


def _explanation(
    heaps: Tensor, weights: Tensor, places: Tensor, bends: Tensor | None
) -> _Explanation:
    width = torch.tensor(math.log(0.7 / len(heaps) ** 0.5), dtype=heaps.dtype)

    def fitted(start: Tensor) -> Tensor:
        return start.detach().clone().requires_grad_()

    return _Explanation(
        heaps=fitted(heaps),
        log_width=fitted(width),
        weights=fitted(weights),
        places=fitted(places),
        bends=None if bends is None else fitted(bends),
    )
