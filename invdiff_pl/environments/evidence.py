"""Is there a bias at all? What would have to be seen before environments are acted on."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.environments.cuts import cells_of, prompt_means, upper_groups
from invdiff_pl.environments.figures import less_clear
from invdiff_pl.environments.pursuit import HiddenAttribute
from invdiff_pl.environments.refine import Refined

# Both halves of the images must find the attribute: correlation of their scores.
LEAST_AGREEMENT = 0.85
# It must fall into groups: gain in log-likelihood an image of two groups over one.
LEAST_GAIN = 0.11
# It must be one attribute of all prompts: its groups are told apart in the same way in each, or
# they are clear and those that each prompt's own images show most clearly (likeness times clarity
# times gain).
LEAST_ALIGNMENT = 0.3
LEAST_COMMON = 0.06
# The prompts' shares of a group must differ by this much; weaker biases are not told from none.
LEAST_SHARE_SPREAD = 0.3


@dataclass(frozen=True)
class Evidence:
    """Whether some hidden attribute goes along with the prompts, measured without labels.

    Attributes:
        bias_found: ``None`` where it cannot be told.
        reason: for people.
        agreement: correlation of the scores found on two halves of the images, in [0, 1].
        clarity: of the groups on images that the direction was not found on, see
            :class:`~invdiff_pl.environments.figures.Direction`, as are the next three.
        gain: of two groups over one there.
        likelihood_ratio: of different against equal shares there.
        alignment: of the groups over prompts there.
        likeness: correlation of the groups that the prompts share with those where each prompt's
            own refinement ended, clearer or not, in the less alike prompts.
        share_spread: by how much the prompts' shares of the groups differ, of all images: twice
            the standard deviation over prompts, in [0, 1].
    """

    bias_found: bool | None
    reason: str
    agreement: float | None = None
    clarity: float | None = None
    gain: float | None = None
    likelihood_ratio: float | None = None
    alignment: float | None = None
    likeness: float | None = None
    share_spread: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The same, JSON-ready."""
        return asdict(self)


def weigh(
    found: HiddenAttribute | None, refined: Refined, prompts: Tensor, values: Tensor | None = None
) -> Evidence:
    """Judge what the pursuit found.

    Args:
        found: its result; ``None`` if there was nothing to compare.
        refined: its scores of all images, refined.
        prompts: int64 ``[N]``.
        values: int64 ``[N]``, of an attribute that is known, where another was sought with each
            prompt's images of either value as a prompt of their own.
    """
    if found is None:
        return Evidence(None, "one prompt, or too few images, to compare: bias is not tested for")
    figures, spread = found.held_out, share_spread(refined.scores, prompts, values)
    cells = prompts if values is None else cells_of(prompts, values)
    likeness = group_likeness(found.scores, refined.ends, cells)
    shown = likeness * figures.clarity * figures.gain
    common = max(figures.alignment / LEAST_ALIGNMENT, shown / LEAST_COMMON)
    shortcomings = [
        text
        for value, least, text in (
            (found.agreement, LEAST_AGREEMENT, "only one half of the images shows it"),
            (figures.gain, LEAST_GAIN, "its values do not fall into clear groups"),
            (common, 1.0, "it is not the same in all prompts"),
            (spread, LEAST_SHARE_SPREAD, "all prompts have much the same share of it"),
        )
        if not value >= least
    ]
    reason = "; ".join(shortcomings) or "the prompts differ in their shares of two clear groups"
    return Evidence(
        bias_found=not shortcomings,
        reason=reason,
        agreement=found.agreement,
        clarity=figures.clarity,
        gain=figures.gain,
        likelihood_ratio=figures.likelihood_ratio,
        alignment=figures.alignment,
        likeness=likeness,
        share_spread=spread,
    )


def group_likeness(first: Tensor, second: Tensor, prompts: Tensor) -> float:
    """Whether two scores cut the prompts' images into the same groups.

    Two attributes, of one prompt's images each, may show along one direction; but then each
    prompt's own images fall into clearer groups along another.

    Args:
        first: scores ``[N]``.
        second: likewise, turned alike.
        prompts: int64 ``[N]``.

    Returns:
        correlation in [-1, 1] of their groups by the best cut, in the less alike prompts, see
        :func:`~invdiff_pl.environments.figures.less_clear`; 0 for a prompt left whole.
    """
    prompts = prompts.unique(return_inverse=True)[1]
    groups = upper_groups(torch.stack([first, second], dim=1).double(), prompts).double()
    centred = groups - prompt_means(groups, prompts)[prompts]
    variances = prompt_means(centred.square(), prompts).prod(1)
    covariances = prompt_means(centred.prod(1), prompts)
    likenesses = covariances / variances.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return float(less_clear(likenesses[:, None], prompts))


def share_spread(scores: Tensor, prompts: Tensor, values: Tensor | None = None) -> float:
    """By how much the prompts differ in the share of images above the best cut.

    Args:
        scores: ``[N]``, turned alike in all prompts.
        prompts: int64 ``[N]``.
        values: int64 ``[N]``, of an attribute that is known: each prompt's images of either value
            are cut by themselves, and prompts compared at the same value: the shares are taken to
            be a prompt's part plus a value's, by least squares.

    Returns:
        twice the standard deviation over prompts, by size; 0 where prompts share no value by which
        all could be compared.
    """
    prompts = prompts.unique(return_inverse=True)[1]
    values = torch.zeros_like(prompts) if values is None else values.unique(return_inverse=True)[1]
    cells = cells_of(prompts, values)
    shares = prompt_means(upper_groups(scores, cells).double(), cells)
    prompt_of, value_of = (torch.zeros_like(cells.bincount()).index_put((cells,), each)
                           for each in (prompts, values))  # fmt: skip
    design = torch.cat([one_hot(prompt_of), one_hot(value_of)], dim=1).double()
    # The parts are told but for a constant, which moves from prompts to values.
    if int(torch.linalg.matrix_rank(design)) < design.shape[1] - 1:
        return 0.0
    weights = cells.bincount().double().sqrt()
    solved = torch.linalg.lstsq(
        design * weights[:, None], (shares * weights)[:, None], driver="gelsd"
    )
    parts = solved.solution[prompts, 0]
    return 2 * float(parts.std(correction=0))
