"""The table of counts, summed over ranks, on which every measure of bias rests."""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from invdiff_pl.utils.errors import InvDiffError


class AttributeCounts(Metric):
    """Base class that counts samples by prompt and attribute class, or combination of classes.

    A sampler may be balanced over each of two attributes and still draw only two of the four
    combinations. With K and L classes, combination ``i * L + j`` is class i of the first attribute
    with class j of the second. The only state is the table of counts, summed over ranks, so a rank
    may see any share of the samples, or none.

    Args:
        num_prompts: number of prompts P, at least 1.
        num_classes: number of attribute classes K, at least 2; one number per attribute for several
            attributes.
        confidence: confidence level of the intervals, in (0, 1).
        target: shares that the classes (or combinations) should have, positive, ``[K]`` or
            ``[P, K]``; even if not given.
        kwargs: further arguments of ``torchmetrics.Metric``.

    Raises:
        InvDiffError: if an argument is out of range.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = False
    counts: Tensor

    def __init__(
        self,
        num_prompts: int,
        num_classes: int | Sequence[int],
        confidence: float = 0.95,
        target: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.classes = (num_classes,) if isinstance(num_classes, int) else tuple(num_classes)
        for name, value, least in (
            ("num_prompts", num_prompts, 1),
            ("num_classes", min(self.classes, default=0), 2),
        ):
            if value < least:
                raise InvDiffError(f"{name} must be at least {least}, not {value}.")
        if not 0 < confidence < 1:
            raise InvDiffError(f"confidence must lie between 0 and 1, not {confidence}.")
        self.num_prompts, self.num_classes = num_prompts, math.prod(self.classes)
        self.confidence = confidence
        self.target = (
            None if target is None else check_target(target, num_prompts, self.num_classes)
        )
        counts = torch.zeros(num_prompts, self.num_classes, dtype=torch.long)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, prompts: Tensor, *attributes: Tensor) -> None:
        """Count N samples.

        Args:
            prompts: integer ``[N]``, prompt of each sample, in [0, P).
            attributes: integer ``[N]``, class of each sample, in [0, K): one tensor per attribute.

        Raises:
            InvDiffError: if shapes differ, values are not integers or a label is out of range.
        """
        name = type(self).__name__
        if len(attributes) != len(self.classes):
            raise InvDiffError(
                f"{name} counts {len(self.classes)} attributes, found {len(attributes)}."
            )
        for labels in attributes:
            if prompts.shape != labels.shape or prompts.ndim != 1:
                raise InvDiffError(
                    f"{name} needs one prompt and one attribute per sample, [N] and [N]; "
                    f"found shapes {list(prompts.shape)} and {list(labels.shape)}."
                )
        cells = self._labels("prompt", prompts, self.num_prompts)
        for number, (labels, classes) in enumerate(
            zip(attributes, self.classes, strict=True), start=1
        ):
            told = "attribute" if len(attributes) == 1 else f"attribute {number}"
            cells = cells * classes + self._labels(told, labels, classes)
        self.counts += cells.bincount(minlength=self.counts.numel()).view_as(self.counts)

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Compute the figures over all samples of all ranks."""

    def _labels(self, name: str, labels: Tensor, bound: int) -> Tensor:
        if labels.is_floating_point() or labels.is_complex():
            raise InvDiffError(f"{name} labels must be integers, not {labels.dtype}.")
        labels = labels.to(self.counts.device, torch.long)
        outside = labels[(labels < 0) | (labels >= bound)]
        if len(outside) > 0:
            raise InvDiffError(
                f"{name} labels must lie in 0..{bound - 1}, found {int(outside[0])}: check the "
                f"labels, or the number of prompts and classes that {type(self).__name__} was "
                "made with."
            )
        return labels

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # torchmetrics squeezes tensors of one element: for one prompt, [1] would become [].
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def keep_prompts(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            result = wrapped(*args, **kwargs)
            return {
                name: value if value.ndim or _is_scalar(name) else value.reshape(1)
                for name, value in result.items()
            }

        return keep_prompts


def _is_scalar(figure: str) -> bool:
    return figure == "std" or figure.rpartition("_")[2] == "mean"


def check_target(target: Tensor, num_prompts: int, num_classes: int) -> Tensor:
    """Check the shares that classes should have, and expand them to float64 ``[P, K]`` on the CPU.

    Args:
        target: wanted shares, ``[K]`` or ``[P, K]``.
        num_prompts: P.
        num_classes: K.

    Raises:
        InvDiffError: if the shape is wrong, or a row is not a distribution of positive shares.
    """
    target = target.detach().cpu().double()
    if target.shape not in ((num_classes,), (num_prompts, num_classes)):
        raise InvDiffError(
            f"the target distribution must have shape [{num_classes}] or [{num_prompts}, "
            f"{num_classes}], a share for each attribute class, found {list(target.shape)}."
        )
    if bool((target <= 0).any()) or bool(((target.sum(-1) - 1).abs() > 1e-6).any()):
        raise InvDiffError(
            f"the target distribution must hold positive shares that sum to 1, found "
            f"{target.tolist()}."
        )
    return target.expand(num_prompts, num_classes)
