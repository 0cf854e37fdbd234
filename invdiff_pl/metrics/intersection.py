"""Bias over two attributes at once."""

from typing import Any

from torch import Tensor

from invdiff_pl.metrics.bias import BiasScore, bias_statistics
from invdiff_pl.utils.errors import InvDiffError


class IntersectionalBias(BiasScore):
    """Bias over the combinations of two attributes; :meth:`marginals` gives that of each alone.

    A sampler may be balanced over either attribute and still draw only two of four combinations.
    Combination ``i * L + j`` is class i of the first attribute with class j of the second.

    Args:
        num_prompts: number of prompts P.
        first_classes: number of classes K of the first attribute, at least 2.
        second_classes: number of classes L of the second attribute, at least 2.
        kwargs: further arguments of :class:`~invdiff_pl.metrics.bias.BiasScore`.

    Raises:
        InvDiffError: if an argument is out of range.
    """

    def __init__(
        self, num_prompts: int, first_classes: int, second_classes: int, **kwargs: Any
    ) -> None:
        if min(first_classes, second_classes) < 2:
            raise InvDiffError(
                "both attributes need at least 2 classes, found "
                f"{first_classes} and {second_classes}."
            )
        super().__init__(num_prompts, first_classes * second_classes, **kwargs)
        self.first_classes, self.second_classes = first_classes, second_classes

    def update(self, prompts: Tensor, first: Tensor, second: Tensor) -> None:  # type: ignore[override]
        """Count N samples.

        Args:
            prompts: integer ``[N]``, in [0, P).
            first: integer ``[N]``, class of the first attribute, in [0, K).
            second: integer ``[N]``, class of the second attribute, in [0, L).

        Raises:
            InvDiffError: if shapes differ, values are no integers or a label is out of range.
        """
        first = self._labels("first attribute", first, self.first_classes)
        second = self._labels("second attribute", second, self.second_classes)
        if first.shape != second.shape:
            raise InvDiffError(
                "both attributes need one label a sample, found shapes "
                f"{list(first.shape)} and {list(second.shape)}."
            )
        super().update(prompts, first * self.second_classes + second)

    def marginals(self) -> dict[str, dict[str, Tensor]]:
        """Figures of :func:`~invdiff_pl.metrics.bias.bias_statistics` of each attribute alone.

        Returns:
            by ``first`` and ``second``; every rank must call it.
        """
        table = self.compute()["counts"].unflatten(-1, (self.first_classes, self.second_classes))
        tables = {"first": table.sum(-1), "second": table.sum(-2)}
        return {name: bias_statistics(counts, self.confidence) for name, counts in tables.items()}
