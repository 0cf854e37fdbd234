import pytest
import torch
from torch import Tensor

from invdiff_pl.environments import refine as refine_module
from invdiff_pl.environments.quality import auc
from invdiff_pl.environments.refine import LEAST_LIKENESS, refine

COUNT, WIDTH = 3000, 8


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
def test_from_halfway_between_two_attributes_it_ends_at_the_clearer(seed) -> None:
    table, clear, other = _two_attributes(seed, (8.0, 3.0))
    source = torch.Generator().manual_seed(seed)
    start = table[:, 0] + 1.2 * table[:, 1]
    start = start + 0.5 * torch.randn(COUNT, generator=source, dtype=torch.float64)
    assert _ranked(start, clear) < 0.9
    refined = refine(table, start, torch.zeros(COUNT, dtype=torch.int64))
    assert _ranked(refined, clear) > 0.999
    assert _ranked(refined, other) < 0.6


def test_a_clearer_attribute_that_the_scores_hardly_show_is_not_taken() -> None:
    table, wanted, clearer = _two_attributes(0, (5.0, 30.0))
    start = table[:, 0] + 0.3 * table[:, 1]
    assert _likeness(start, clearer) < LEAST_LIKENESS
    refined = refine(table, start, torch.zeros(COUNT, dtype=torch.int64))
    assert _ranked(refined, wanted) > 0.99
    assert abs(_likeness(refined, clearer)) < 0.1


def test_refined_scores_point_as_the_scores_do_in_every_prompt() -> None:
    table, clear, _ = _two_attributes(0, (8.0, 0.0))
    prompts = torch.arange(COUNT) % 2
    start = torch.where(prompts == 0, table[:, 0], -table[:, 0])
    refined = refine(table, start, prompts)
    assert _ranked(refined[prompts == 0], clear[prompts == 0]) > 0.999
    assert _ranked(-refined[prompts == 1], clear[prompts == 1]) > 0.999


def test_the_direction_from_a_part_of_the_images_serves_them_all(monkeypatch) -> None:
    table, _, _ = _two_attributes(0, (8.0, 3.0))
    prompts = torch.zeros(COUNT, dtype=torch.int64)
    whole = refine(table, table[:, 0], prompts)
    monkeypatch.setattr(refine_module, "IMAGES", 600)
    part = refine(table, table[:, 0], prompts)
    assert not torch.equal(part, whole)
    assert _likeness(part, whole) > 0.99


def test_the_same_seed_refines_alike_and_values_alone_in_a_group_make_none() -> None:
    table, _, _ = _two_attributes(0, (0.0, 0.0))
    table[0] = 200.0  # one image far off, the clearest "group" there is
    prompts = torch.zeros(COUNT, dtype=torch.int64)
    start = table[:, 0]
    refined = refine(table, start, prompts)
    assert torch.equal(refined, start)
    assert torch.equal(refined, refine(table, start, prompts))
