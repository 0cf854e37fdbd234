"""How well environments match an attribute: used only for scoring, if labels exist."""

from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


def conflicting(prompts: Tensor, attributes: Tensor) -> Tensor:
    """Find images against the bias: those whose (prompt, attribute) cell is under-represented.

    Args:
        prompts: int64 ``[N]``.
        attributes: int64 ``[N]`` in K classes.

    Returns:
        bool ``[N]``, true if the cell holds less than 1/K of the prompt's images.
    """
    classes = int(attributes.max()) + 1
    cells = prompts * classes + attributes
    sizes = cells.bincount(minlength=(int(prompts.max()) + 1) * classes)
    return sizes[cells] * classes < prompts.bincount()[prompts]


def auc(scores: Tensor, positives: Tensor) -> float | None:
    """Return the probability that a positive scores higher, ties counting half (Mann-Whitney).

    Args:
        scores: ``[N]``.
        positives: bool ``[N]``.

    Returns:
        in [0, 1]; ``None`` without a positive or without a negative.
    """
    if int(positives.sum()) in (0, len(scores)):
        return None
    # By rank: torchmetrics would squash values outside [0, 1], and close ones into ties.
    ranks = scores.unique(return_inverse=True)[1].double()
    return float(binary_auroc(ranks / ranks.max().clamp(min=1), positives.long()))


def worst_group_precision_recall(
    assignments: Tensor, prompts: Tensor, attributes: Tensor
) -> tuple[float | None, float | None]:
    """Return the lowest precision and recall, over prompts, of singling out conflicting images.

    An image counts as singled out if it is not in environment 0, which is usual in its prompt.
    Prompts without conflicting images are left out; if nothing is singled out, precision is 0.

    Returns:
        precision and recall in [0, 1]; ``None`` if no prompt has conflicting images.
    """
    positives, found = conflicting(prompts, attributes), assignments > 0
    precisions, recalls = [], []
    for prompt in prompts[positives].unique().tolist():
        here = prompts == prompt
        hits = int((positives & found & here).sum())
        precisions.append(hits / max(1, int((found & here).sum())))
        recalls.append(hits / int((positives & here).sum()))
    return (min(precisions), min(recalls)) if recalls else (None, None)


def adjusted_rand_index(first: Tensor, second: Tensor) -> float:
    """Agreement of two labellings (Hubert & Arabie 1985): 1 if identical, about 0 by chance.

    Counts pairs in float64: torchmetrics' ``adjusted_rand_score`` multiplies them as int64, which
    overflows from some 70,000 images on.

    Args:
        first: int64 ``[N]``.
        second: int64 ``[N]``.
    """
    width = int(second.max()) + 1
    table = (first * width + second).bincount(minlength=(int(first.max()) + 1) * width)
    table = table.reshape(-1, width).double()

    def pairs(counts: Tensor) -> Tensor:
        return (counts * (counts - 1) / 2).sum()

    rows, columns, both = pairs(table.sum(1)), pairs(table.sum(0)), pairs(table)
    expected = rows * columns / pairs(table.sum()[None])
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else float((both - expected) / (largest - expected))


def environment_report(
    scores: Tensor,
    memberships: Tensor,
    prompts: Tensor,
    attributes: Tensor | None,
) -> dict[str, Any]:
    """Report the sizes of the environments and how well they match labels, JSON-ready.

    Args:
        scores: ``[N]``.
        memberships: memberships in G environments, ``[N, G]``; the first is what is usual.
        prompts: int64 ``[N]``.
        attributes: labels for scoring, int64 ``[N]``; ``None`` if there are none.

    Returns:
        ``per_prompt``: sizes and confidence, the mean membership in the likeliest environment; only
        with attributes, ``auc``, ``precision``, ``recall`` and ``adjusted_rand_index``, pooled and
        by prompt, and ``worst_group_precision`` and ``worst_group_recall``.
    """
    assignments, groups = memberships.argmax(1), memberships.shape[1]
    positives = None if attributes is None else conflicting(prompts, attributes)
    report: dict[str, Any] = {"per_prompt": []}
    for prompt in range(int(prompts.max()) + 1):
        here = prompts == prompt
        sizes = assignments[here].bincount(minlength=groups).tolist()
        entry: dict[str, Any] = {"sizes": sizes}
        if here.any():
            entry["confidence"] = float(memberships[here].max(1).values.mean())
            if positives is not None:
                entry |= _matches(scores[here], assignments[here], positives[here])
        report["per_prompt"].append(entry)
    if attributes is not None and positives is not None:
        precision, recall = worst_group_precision_recall(assignments, prompts, attributes)
        report |= {
            **_matches(scores, assignments, positives),
            "worst_group_precision": precision,
            "worst_group_recall": recall,
        }
    return report


def _matches(scores: Tensor, assignments: Tensor, positives: Tensor) -> dict[str, float | None]:
    """How well scores and assignments single out the positives."""
    found, hits = assignments > 0, (assignments > 0) & positives
    there = bool(positives.any())
    return {
        "auc": auc(scores, positives),
        "precision": float(hits.sum() / found.sum().clamp(min=1)) if there else None,
        "recall": float(hits.sum() / positives.sum()) if there else None,
        "adjusted_rand_index": adjusted_rand_index(assignments, positives.long()),
    }
