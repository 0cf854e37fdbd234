"""Whether prompts' distributions differ by shares or by looks."""

import pytest
import torch
from torch import Tensor

from invdiff_pl.environments.looks import shares_over_looks

PROMPTS = torch.arange(2400) % 3


def heaps(shares: Tensor, seed: int = 0) -> Tensor:
    """Two heaps, four widths apart, of which each prompt has a share in the upper: ``[N]``."""
    source = torch.Generator().manual_seed(seed)
    upper = torch.rand(len(PROMPTS), generator=source) < shares[PROMPTS]
    return 4.0 * upper + torch.randn(len(PROMPTS), generator=source).double()


def explained(line: Tensor) -> float:
    return shares_over_looks(line, PROMPTS, torch.zeros(3).double())


@pytest.mark.parametrize("seed", range(3))
def test_mirrored_shares_of_two_heaps_are_explained_by_shares(seed: int) -> None:
    assert explained(heaps(torch.tensor([0.2, 0.5, 0.8]), seed)) > 50


@pytest.mark.parametrize("seed", range(3))
def test_equal_shares_of_heaps_that_each_prompt_bends_are_explained_by_looks(seed: int) -> None:
    straight = heaps(torch.tensor([0.5, 0.5, 0.5]), seed) / 2 - 1
    skewness = torch.tensor([-0.5, 0.0, 0.5]).double()[PROMPTS]
    assert explained(torch.sinh(straight.asinh() + skewness)) < -20


def test_one_heap_that_each_prompt_stretches_is_explained_by_looks() -> None:
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(len(PROMPTS), generator=source).double()
    assert explained(noise * torch.tensor([0.6, 1.0, 1.6])[PROMPTS]) < -50


def test_the_unit_of_the_line_and_prompts_places_do_not_matter() -> None:
    line, places = heaps(torch.tensor([0.2, 0.5, 0.8])), torch.tensor([0.0, 30.0, -5.0]).double()
    moved = shares_over_looks(100 * (line + places[PROMPTS]), PROMPTS, 100 * places)
    assert moved == pytest.approx(explained(line), rel=0.05)
