"""What each part of the pursuit of a hidden attribute is worth.

    python benchmarks/pursuit.py --fine-tune 400 --precision bf16-mixed [--seeds 0 1 2]

On the losses of ``benchmarks/environments.py`` (made if they are not there yet, with the same
flags): AUC of the default score for images against the bias, and whether a bias is found, with the
pursuit as it is and with one part of it changed at a time. Nothing but the losses is kept.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from environments import add_loss_flags, chosen, losses_and_labels
from torch import Tensor

from invdiff_pl.environments import directions, figures, pursuit
from invdiff_pl.environments.cuts import TWO_MEANS, UNEVEN, CutRule
from invdiff_pl.environments.evidence import weigh
from invdiff_pl.environments.quality import auc, conflicting
from invdiff_pl.environments.refine import by_group
from invdiff_pl.environments.scores import Losses, attribute_scores

# Those of weak bias and of few images against it, where parts differ; others by --strengths.
STRENGTHS = ("0.99", "1:2:2:1", "3:2:1:1:1:1:2:3", "8:4:1:1:1:1:4:8")


@contextmanager
def _changed(places: Sequence[tuple[Any, str, object]]) -> Iterator[None]:
    """With other constants."""
    with ExitStack() as stack:
        for module, name, value in places:
            stack.enter_context(patch.object(module, name, value))
        yield


def _ruled(*rules: CutRule) -> list[tuple[Any, str, object]]:
    return [(module, "RULES", rules) for module in (directions, figures, pursuit)]


def _by_uneven(cut: Callable[..., Any]) -> Callable[..., Any]:
    """Figures by the uneven cut, whichever is asked for."""
    return lambda values, prompts, _rule=UNEVEN: cut(values, prompts, UNEVEN)


VARIANTS: dict[str, list[tuple[Any, str, object]]] = {
    "as it is": [],
    "two-means only": _ruled(TWO_MEANS),
    "the uneven cut only": _ruled(UNEVEN),
    "ranked by the uneven cut": [(figures, "cut_by_prompt", _by_uneven(figures.cut_by_prompt))],
    "alignment does not count": [(figures, "ALIGNED", 0.0)],
    "one finalist a half": [(pursuit, "FINALISTS", 1)],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each data set, strength of bias and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    add_loss_flags(parser)
    parser.set_defaults(strengths=STRENGTHS)
    options = parser.parse_args(arguments)
    print("| AUC; bias found | seed |", " | ".join(VARIANTS), "|")
    print("| --- " * (2 + len(VARIANTS)) + "|")
    for setting in chosen(options):
        for seed in options.seeds:
            losses, prompts, attributes = losses_and_labels(setting, seed, options)
            cells = [f"{setting.experiment} {setting.name}", str(seed)]
            for places in VARIANTS.values():
                with _changed(places):
                    cells.append(_told(losses, prompts, attributes))
            print("|", " | ".join(cells), "|", flush=True)


def _told(losses: Losses, prompts: Tensor, attributes: Tensor) -> str:
    """AUC and verdict of the default score."""
    found, refined = attribute_scores(losses, prompts)
    area = auc(by_group(refined.scores, prompts), conflicting(prompts, attributes))
    verdict = "yes" if weigh(found, refined, prompts).bias_found else "no"
    return f"{verdict}" if area is None else f"{area:.3f}; {verdict}"


if __name__ == "__main__":
    main()
