"""Two biases at once, a scene and a tint: which of them the inference of environments finds.

    python benchmarks/two_biases.py [--strengths 0.95:0.8 0.8:0.95] [--fine-tune 400]

Draws birds whose place and whose light both go along with the species, independently of each
other given the species; trains the shipped backbone on them, so that it knows both; scores the
training images, and prints what environments have to do with place and with tint, for 2, 4 and a
chosen number of groups. ``place:tint`` are the shares of each species' pictures in its own place
and its own light; ``0.95:none`` has no tint. Results are kept in ``.cache/environments-bench``.
"""

import argparse
from collections.abc import Sequence

import torch
from environments import CACHE, Setting, losses_of, prepared
from torch import Tensor

from invdiff_pl.cli.lightning import data_module
from invdiff_pl.data.tables import check_codes, read_table
from invdiff_pl.environments.inference import Inferred, Settings, infer
from invdiff_pl.environments.quality import adjusted_rand_index, auc, conflicting

HEADER = (
    "place / tint",
    "groups asked for",
    "made",
    "a first bias",
    "a second",
    "score: AUC place, tint",
    "second score: AUC place, tint",
    "adjusted Rand index with place, tint, either, the four cells",
    "worst recall of the four cells",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, train and score what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--strengths", nargs="+", default=["0.95:0.8", "0.8:0.95"])
    parser.add_argument("--fine-tune", type=int, default=400, metavar="STEPS")
    parser.add_argument("--precision", default="bf16-mixed", help="of forward passes and training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments, argparse.Namespace(images=4800, own_draws=1))
    print("|", " | ".join(HEADER), "|")
    print("| --- " * len(HEADER) + "|")
    for strength in options.strengths:
        for row in rows_of(strength, options):
            print("|", " | ".join(row), "|", flush=True)


def rows_of(strength: str, options: argparse.Namespace) -> list[list[str]]:
    """A row for each number of groups."""
    place, tint = strength.split(":")
    name = f"two-biases-{place}-{tint}"
    flags = [f"--correlation={place}"]
    flags += [] if tint == "none" else [f"--tint_correlation={tint}"]
    setting = Setting("waterbirds", name, tuple(flags))
    run_flags = prepared(setting, CACHE / name, options)
    scored = f"{name}-seed{options.seed}-{options.fine_tune}-{options.precision}"
    losses = losses_of(run_flags, CACHE / scored, options.seed, options)
    data = data_module(run_flags)
    prompts, places = data.labels("train")
    assert places is not None
    table = read_table(data.root / "metadata.csv", ["split", "place"], optional=["tint"])
    training = torch.from_numpy(check_codes(table["split"], "split", 3, data.root)) == 0
    read = {
        column: torch.from_numpy(check_codes(table[column], column, 2, data.root))[training]
        for column in ("place", "tint")
        if column in table.columns
    }
    assert torch.equal(read["place"], places), "training images are not in the table's order"
    against = [conflicting(prompts, values) for values in read.values()]
    rows = []
    for groups in (2, 4, None):
        found = infer(losses, prompts, Settings(groups=groups, seed=options.seed))
        rows.append([strength, "by the data" if groups is None else str(groups)])
        rows[-1] += told(found, against)
    return rows


def told(found: Inferred, against: list[Tensor]) -> list[str]:
    """The cells of a row: what the environments have to do with images against each bias."""
    cells = sum(2**number * rare.long() for number, rare in enumerate(against))
    assert isinstance(cells, Tensor)
    groups = found.result.assignments
    verdicts = [
        {None: "not sought", True: "yes", False: "no"}[each.bias_found if each else None]
        for each in (found.evidence, found.second)
    ]
    truths = [*(rare.long() for rare in against), (cells > 0).long(), cells]
    indices = [adjusted_rand_index(groups, truth) for truth in truths]
    # The share of a cell that lies in the environment where most of the cell's images are; cells
    # that share an environment are not told apart, and count as missed but for the largest.
    table = torch.zeros(int(cells.max()) + 1, found.groups)
    table.index_put_((cells, groups), torch.ones(len(cells)), accumulate=True)
    owned = torch.where(table == table.max(0).values, table, 0.0)
    recalls = owned.max(1).values / table.sum(1)
    return [
        str(found.groups),
        *verdicts,
        areas(found.scores, against),
        "" if found.second_scores is None else areas(found.second_scores, against),
        ", ".join(f"{index:.2f}" for index in indices),
        f"{recalls.min():.2f}",
    ]


def areas(scores: Tensor, against: list[Tensor]) -> str:
    """AUC of the scores for images against each bias."""
    return ", ".join("" if (a := auc(scores, rare)) is None else f"{a:.3f}" for rare in against)


if __name__ == "__main__":
    main()
