"""Settings of the search for hidden attributes: every number that a user may set."""

from collections.abc import Sequence
from dataclasses import dataclass

from invdiff_pl.utils.errors import InvDiffError


@dataclass(frozen=True)
class HiddenAttributeSettings:
    """Settings of the search for hidden attributes.

    Attributes:
        components: D, number of principal components within prompts. 10 miss what is rare or shows
            in details, such as gender in the rendered CelebA at 1:8:8:1 (AUC 0.4 to 0.6, not 0.99).
        starts: number of starting points for attributes of two values, half of them directions of
            skewness; 60 miss gender in 3 of 9 sets of the rendered CelebA, seeds 10 to 12.
        values: K, numbers of values that are tried beside two, if prompts have 50 images or more on
            average; if empty, only attributes of two values are looked for.
        candidates: maximum number of candidates returned.
        alpha: how often a bias may be reported if there is none.
        resamples: number of data sets without a bias that the search is repeated on, at least
            ``1 / alpha - 1``.
        least_difference: smallest difference of shares between prompts (twice their standard
            deviation) that is called a bias, however certain it is; both as estimated from each
            prompt's own images and as implied by the other prompts.
        quantile: share of the prompts in which an attribute need not be clear.
        most_images: maximum number of images searched, drawn at random; all images are assigned.
        seed: seed of the starts, the resamples and the choice of the images searched.

    Raises:
        ValueError: if the test could never report a bias: its p-value is at least
            ``1 / (resamples + 1)``.
    """

    components: int = 40
    starts: int = 480
    values: Sequence[int] = (4, 8, 16, 32, 64)
    candidates: int = 5
    alpha: float = 0.05
    resamples: int = 19
    least_difference: float = 0.1
    quantile: float = 0.3
    most_images: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject a level that the test cannot reach."""
        if not 1 / (self.resamples + 1) <= self.alpha < 1:
            raise InvDiffError(
                f"alpha={self.alpha} with resamples={self.resamples}: expected alpha from "
                f"1/(resamples + 1) = {1 / (self.resamples + 1):.3g} to below 1, since no p-value "
                "is lower; give more resamples.",
                "alpha",
                "resamples",
            )
