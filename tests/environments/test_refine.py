import pytest
import torch
from torch import Tensor

from invdiff_pl.environments import refine as refine_module
from invdiff_pl.environments.quality import auc
from invdiff_pl.environments.refine import LEAST_LIKENESS, by_group, refine

COUNT, WIDTH = 3000, 8
ONE_PROMPT = torch.zeros(COUNT, dtype=torch.int64)


def _two_attributes(seed: int, distances: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Readings of one prompt's images, in which two attributes show along an axis each."""
    source = torch.Generator().manual_seed(seed)
    table = torch.randn(COUNT, WIDTH, generator=source, dtype=torch.float64)
    shown = torch.rand(COUNT, 2, generator=source) < torch.tensor([0.5, 0.4])
    table[:, :2] += shown * torch.tensor(distances, dtype=torch.float64)
    table = (table - table.mean(0)) / table.std(0)
    return table, shown[:, 0], shown[:, 1]


def _ranked(scores: Tensor, positives: Tensor) -> float:
    """AUC."""
    told = auc(scores, positives)
    assert told is not None
    return told


def _likeness(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]).double())[0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_from_between_two_attributes_several_starts_end_at_the_clearer_and_one_does_not(
    seed, monkeypatch
) -> None:
    table, clear, other = _two_attributes(seed, (10.0, 4.0))
    source = torch.Generator().manual_seed(seed)
    start = table[:, 0] + 1.4 * table[:, 1]
    start = start + 0.5 * torch.randn(COUNT, generator=source, dtype=torch.float64)
    refined = refine(table, start, ONE_PROMPT).scores
    assert _ranked(refined, clear) > 0.999
    assert _ranked(refined, other) < 0.6
    monkeypatch.setattr(refine_module, "STARTS", 1)
    assert _ranked(refine(table, start, ONE_PROMPT).scores, clear) < 0.6


def test_a_clearer_attribute_that_the_scores_hardly_show_is_not_taken(monkeypatch) -> None:
    table, wanted, clearer = _two_attributes(0, (5.0, 30.0))
    start = table[:, 0] + 0.45 * table[:, 1]
    assert _likeness(start, clearer) < LEAST_LIKENESS
    monkeypatch.setattr(refine_module, "FARTHEST", 4.0)  # so that some starts end there
    assert _ranked(refine(table, start, ONE_PROMPT).scores, wanted) > 0.99
    monkeypatch.setattr(refine_module, "LEAST_LIKENESS", 0.0)
    assert _ranked(refine(table, start, ONE_PROMPT).scores, clearer) > 0.99


def test_refined_scores_point_as_the_scores_do_whichever_way_the_ends_point(monkeypatch) -> None:
    table, clear, _ = _two_attributes(0, (8.0, 0.0))
    prompts = torch.arange(COUNT) % 2
    start = torch.where(prompts == 0, table[:, 0], -table[:, 0])
    ends = refine_module._ends
    for sign in (1, -1):
        monkeypatch.setattr(refine_module, "_ends", lambda *given, by=sign: by * ends(*given))
        refined = refine(table, start, prompts).scores
        assert not torch.equal(refined, start)
        assert _ranked(refined[prompts == 0], clear[prompts == 0]) > 0.999
        assert _ranked(-refined[prompts == 1], clear[prompts == 1]) > 0.999


def test_the_direction_from_a_part_of_the_images_serves_them_all(monkeypatch) -> None:
    table, _, _ = _two_attributes(0, (8.0, 3.0))
    whole = refine(table, table[:, 0], ONE_PROMPT).scores
    monkeypatch.setattr(refine_module, "IMAGES", 600)
    part = refine(table, table[:, 0], ONE_PROMPT).scores
    assert not torch.equal(part, whole)
    assert _likeness(part, whole) > 0.99


def test_the_same_scores_are_refined_alike() -> None:
    table, _, _ = _two_attributes(0, (8.0, 3.0))
    start = table[:, 0]
    refined = refine(table, start, ONE_PROMPT).scores
    assert not torch.equal(refined, start)
    assert torch.equal(refined, refine(table, start, ONE_PROMPT).scores)


def test_one_image_far_off_is_no_group() -> None:
    table, _, _ = _two_attributes(0, (0.0, 0.0))
    table[0] = 200.0
    assert torch.equal(refine(table, table[:, 0], ONE_PROMPT).scores, table[:, 0])


def test_an_end_that_is_no_clearer_is_told_and_not_taken() -> None:
    table, _, _ = _two_attributes(0, (0.0, 0.0))
    scores, ends = refine(table, table[:, 0], ONE_PROMPT)
    assert torch.equal(scores, table[:, 0])
    assert not torch.equal(ends, scores)
    assert _likeness(ends, scores) >= LEAST_LIKENESS


def test_prompts_of_a_family_are_turned_alike_by_what_is_rare_in_all_of_them() -> None:
    # Upper groups of 1 in 10 and of 3 in 4: rare in the family, not in the second prompt.
    upper = torch.tensor([1.0] + [0.0] * 9 + [1.0] * 3 + [0.0])
    prompts = torch.tensor([0] * 10 + [1] * 4)
    alone = by_group(5 + 2 * upper, prompts)
    torch.testing.assert_close(alone, torch.cat([upper[:10], 1 - upper[10:]]).double())
    together = by_group(5 + 2 * upper, prompts, torch.zeros_like(prompts))
    torch.testing.assert_close(together, upper.double())
