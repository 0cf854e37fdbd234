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

from environments import CACHE, SETTINGS, losses_of, prepared
from torch import Tensor

from invdiff_pl.cli import data_module
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
    parser.add_argument("--experiments", nargs="+", default=["waterbirds", "celeba", "fairface"])
    parser.add_argument("--strengths", nargs="+", default=STRENGTHS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fine-tune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--images", type=int, default=4800, help="of each training split")
    parser.add_argument("--own-draws", type=int, default=2, help="of 8, under the own prompt")
    parser.add_argument("--precision", default="32-true", help="of forward passes and fine-tuning")
    options = parser.parse_args(arguments)
    print("| AUC; bias found | seed |", " | ".join(VARIANTS), "|")
    print("| --- " * (2 + len(VARIANTS)) + "|")
    for setting in SETTINGS:
        if setting.experiment not in options.experiments or setting.name not in options.strengths:
            continue
        name = f"{setting.experiment}-{setting.name.replace(':', '_')}"
        scored = f"{options.fine_tune}-{options.images}-{options.own_draws}-{options.precision}"
        flags = prepared(setting, CACHE / name, options)
        prompts, attributes = data_module(flags).labels("train")
        assert attributes is not None
        for seed in options.seeds:
            losses = losses_of(flags, CACHE / f"{name}-seed{seed}-{scored}", seed, options)
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
