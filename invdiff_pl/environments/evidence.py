"""Is there a bias at all? What would have to be seen before environments are acted on."""

from dataclasses import asdict, dataclass
from typing import Any

from invdiff_pl.environments.pursuit import HiddenAttribute

# Two halves of the images must find the same attribute: correlation of their scores.
LEAST_AGREEMENT = 0.9
# It must fall into groups: share of variance explained by a cut beyond a normal distribution's.
LEAST_CLARITY = 0.08
# The prompts' shares of a group must differ by this much; weaker biases are not told from none.
LEAST_SHARE_SPREAD = 0.25


@dataclass(frozen=True)
class Evidence:
    """Whether some hidden attribute goes along with the prompts, measured without labels.

    Attributes:
        bias_found: ``None`` where it cannot be told.
        reason: for people.
        agreement: correlation of the scores found on two halves of the images, in [0, 1].
        clarity: of the groups on images that the direction was not found on.
        share_spread: by how much the prompts' shares of the groups differ there.
        likelihood_ratio: of different against equal shares there.
    """

    bias_found: bool | None
    reason: str
    agreement: float | None = None
    clarity: float | None = None
    share_spread: float | None = None
    likelihood_ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The same, JSON-ready."""
        return asdict(self)


def weigh(found: HiddenAttribute | None) -> Evidence:
    """Judge what the pursuit found.

    Args:
        found: its result; ``None`` if there was nothing to compare.
    """
    if found is None:
        return Evidence(None, "one prompt, or too few images, to compare: bias is not tested for")
    told = found.held_out
    shortcomings = [
        text
        for value, least, text in (
            (found.agreement, LEAST_AGREEMENT, "two halves of the images disagree on it"),
            (told.clarity, LEAST_CLARITY, "its values do not fall into clear groups"),
            (told.share_spread, LEAST_SHARE_SPREAD, "all prompts have much the same share of it"),
        )
        if value < least
    ]
    reason = "; ".join(shortcomings) or "the prompts differ in their shares of two clear groups"
    return Evidence(
        bias_found=not shortcomings,
        reason=reason,
        agreement=found.agreement,
        clarity=told.clarity,
        share_spread=told.share_spread,
        likelihood_ratio=told.likelihood_ratio,
    )
