"""From losses to environments: scores, the evidence for a bias, and the partition."""

from dataclasses import dataclass, replace

from torch import Tensor

from invdiff_pl.environments.assignment import Assignment, assign, cross
from invdiff_pl.environments.cuts import cells_of, upper_groups
from invdiff_pl.environments.evidence import Evidence, weigh
from invdiff_pl.environments.partition import partition, require_partition
from invdiff_pl.environments.refine import by_group
from invdiff_pl.environments.scores import (
    SCORES,
    Losses,
    attribute_scores,
    score,
    split_half_rank_correlation,
    standardise,
)
from invdiff_pl.environments.soft import choose_groups, mixture_memberships
from invdiff_pl.utils.names import PARTITIONS, require_name

# The largest number of environments that is tried where it is to be chosen.
MOST_GROUPS = 4


@dataclass(frozen=True)
class Settings:
    """How environments are made.

    Attributes:
        score: name of the score, see :data:`invdiff_pl.environments.scores.SCORES`.
        groups: number of environments; ``None`` chooses from 2 to 4. With 4 or ``None``,
            ``prompt_pursuit`` looks for a second attribute within the first one's groups; where the
            evidence for it stands the same test, the environments are the four pairs of both
            attributes' groups.
        partition: see :func:`invdiff_pl.environments.assignment.assign`.
        objective: see :func:`invdiff_pl.environments.partition.partition`.
        minimum_share: least share of a prompt's images in an environment.
        seed: of ``gradient``'s start.
    """

    score: str = "prompt_pursuit"
    groups: int | None = 2
    partition: str = "exact"
    objective: str = "between"
    minimum_share: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no losses could be split by.

        Raises:
            InvDiffError: naming the setting.
        """
        require_name("score", self.score, tuple(SCORES))
        require_name("partition", self.partition, PARTITIONS)
        require_partition(self.groups or 2, self.minimum_share, self.objective)

    @property
    def seeks_second(self) -> bool:
        """Whether two cuts, of two attributes, may be crossed."""
        crossed = self.groups in (4, None) and self.partition in ("exact", "mixture")
        return crossed and self.score == "prompt_pursuit"


@dataclass(frozen=True)
class Inferred:
    """Environments of N images, and what speaks for them.

    Attributes:
        scores: float64 ``[N]``.
        second_scores: likewise of a second attribute, if the environments are crossed.
        result: the environments.
        soft: float32 ``[N, G]``, memberships by a mixture that all prompts share.
        groups: G.
        criteria: of each number of groups, where it was chosen by the likelihood.
        evidence: for a bias.
        second: for a second one beside it; ``None`` if it was not looked for.
        split_half: rank correlation of the scores from two halves of the noises.
    """

    scores: Tensor
    second_scores: Tensor | None
    result: Assignment
    soft: Tensor
    groups: int
    criteria: dict[int, float] | None
    evidence: Evidence
    second: Evidence | None
    split_half: float | None


def infer(losses: Losses, prompts: Tensor, settings: Settings) -> Inferred:
    """Make environments of losses, without labels.

    Args:
        losses: of N images.
        prompts: int64 ``[N]``.
        settings: how.

    Raises:
        InvDiffError: if a setting is out of range.
    """
    found, refined = attribute_scores(losses, prompts)
    evidence = weigh(found, refined, prompts)
    pursued = settings.score == "prompt_pursuit"
    scores = (
        by_group(refined.scores, prompts) if pursued else score(losses, prompts, settings.score)
    )
    table = standardise(losses.null, prompts).flatten(1)
    second, second_scores, crossed = None, None, None
    if settings.seeks_second and evidence.bias_found:
        first = _environments(scores, prompts, 2, table, settings)
        values = upper_groups(refined.scores, prompts).long()
        second, second_scores, crossed = _crossed(losses, prompts, values, first, table, settings)
    if crossed is not None:
        result, soft, groups, criteria = crossed, crossed.memberships, 4, None
    else:
        groups, criteria = _groups(scores, prompts, settings)
        result, soft = _environments(scores, prompts, groups, table, settings)
    known = refined.scores if pursued and found is not None else None
    split_half = split_half_rank_correlation(losses, prompts, settings.score, known)
    return Inferred(
        scores, second_scores, result, soft, groups, criteria, evidence, second, split_half
    )


def _crossed(
    losses: Losses,
    prompts: Tensor,
    values: Tensor,
    first: tuple[Assignment, Tensor],
    table: Tensor,
    settings: Settings,
) -> tuple[Evidence, Tensor | None, Assignment | None]:
    """A second attribute within the values of a first one, and environments of both.

    A prompt's images of either value count as a prompt of their own, and are compared with other
    prompts' images of that value. So nothing of the first attribute is left, and what only one of
    its values shows, such as the kind of water, does not look as if it went along with the prompts.

    Args:
        losses: of N images.
        prompts: int64 ``[N]``.
        values: 0 or 1, int64 ``[N]``: of the first attribute, the same in all prompts; by the best
            cut, which a minimum share does not move as it may the environments' cut.
        first: its environments, and memberships by a mixture.
        table: standardised losses under the empty prompt, ``[N, D]``.
        settings: how.

    Returns:
        the evidence for it; its scores and the pairs of both attributes' groups, if it stands the
        test.
    """
    hard, memberships = first
    cells = cells_of(prompts, values)
    found, refined = attribute_scores(losses, cells, families=prompts)
    evidence = weigh(found, refined, prompts, values)
    if not evidence.bias_found:
        return evidence, None, None
    scores = by_group(refined.scores, cells, families=prompts)
    other, others = _environments(scores, cells, 2, table, settings)
    pair = (replace(hard, memberships=memberships), replace(other, memberships=others))
    return evidence, scores, cross(*pair)


def _environments(
    scores: Tensor, prompts: Tensor, groups: int, table: Tensor, settings: Settings
) -> tuple[Assignment, Tensor]:
    """Environments of one attribute, and their memberships by a mixture."""
    result = assign(
        scores,
        prompts,
        groups,
        method=settings.partition,
        minimum_share=settings.minimum_share,
        objective=settings.objective,
        table=table,
        seed=settings.seed,
    )
    if settings.partition == "mixture":
        return result, result.memberships
    return result, mixture_memberships(scores, prompts, result.assignments)


def _groups(
    scores: Tensor, prompts: Tensor, settings: Settings
) -> tuple[int, dict[int, float] | None]:
    """The number of environments and, if it is chosen here, the criterion of each number."""
    if settings.groups is not None:
        return settings.groups, None
    partitions = {
        groups: partition(
            scores, prompts, groups, min(settings.minimum_share, 1 / groups)
        ).assignments
        for groups in range(2, MOST_GROUPS + 1)
    }
    return choose_groups(scores, prompts, partitions)
