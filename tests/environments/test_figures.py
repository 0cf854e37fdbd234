"""Figures of directions: alignment over prompts, and the evidence made of all."""

import pytest
import torch

from invdiff_pl.environments.figures import ALIGNED, ALIGNMENTS, Direction, alignments


def test_alignment_tells_one_attribute_of_all_prompts_from_one_of_each() -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(4000) % 2
    noise = torch.randn(4000, 6, generator=source, dtype=torch.float64)
    groups = (torch.rand(4000, generator=source) < 0.3).double()
    shared, own = noise.clone(), noise.clone()
    shared[:, 0] += 4 * groups
    own[torch.arange(4000), prompts] += 4 * groups
    for readings, expected in ((shared, 1.0), (own, 0.0)):
        told = alignments(readings, prompts, groups[:, None])
        assert float(told) == pytest.approx(expected, abs=0.05)


def test_parts_of_one_prompt_are_not_compared_for_alignment() -> None:
    source = torch.Generator().manual_seed(0)
    cells = torch.arange(4000) % 4
    prompts = cells // 2
    groups = (torch.rand(4000, generator=source) < 0.3).double()
    readings = torch.randn(4000, 6, generator=source, dtype=torch.float64)
    readings[torch.arange(4000), prompts] += 4 * groups  # each prompt's own, in both of its parts
    every = float(alignments(readings, cells, groups[:, None]))
    assert every == pytest.approx(1 / 3, abs=0.05)  # two of six pairs are of one prompt
    apart = float(alignments(readings, cells, groups[:, None], families=prompts))
    assert apart == pytest.approx(0.0, abs=0.05)
    by_itself = alignments(readings, cells, groups[:, None], families=cells)
    assert float(by_itself) == pytest.approx(every)


def test_alignment_is_nothing_where_there_are_no_pairs_to_compare() -> None:
    source = torch.Generator().manual_seed(0)
    readings = torch.randn(301, 4, generator=source, dtype=torch.float64)
    groups = (torch.rand(301, 1, generator=source) < 0.5).double()
    for prompts, families in (
        (torch.arange(301) % 3, torch.zeros(301, dtype=torch.int64)),  # parts of one prompt
        ((torch.arange(301) == 300).long(), None),  # one image of another
    ):
        assert float(alignments(readings, prompts, groups, families)) == 0.0


def test_evidence_grows_with_alignment_between_its_bounds_only() -> None:
    def evidence(alignment: float) -> float:
        return Direction(torch.ones(1), 0.3, 0.2, 400.0, alignment).evidence

    least, enough = ALIGNMENTS
    alone = 0.3 * 0.2 * 20
    for alignment, factor in ((-0.2, 0), (least, 0), (enough, 1), (0.9, 1), (0.2, 0.5)):
        assert evidence(alignment) == pytest.approx(alone * (1 + ALIGNED * factor), rel=1e-5)
