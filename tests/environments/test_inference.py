"""From losses to environments: one bias gives a cut, two give pairs of groups."""

import pytest
import torch

from invdiff_pl.environments.inference import Settings, infer
from invdiff_pl.environments.quality import adjusted_rand_index, conflicting
from invdiff_pl.environments.scores import Losses


def _losses(second_share: float, seed: int = 0):
    """Losses that tell two attributes of images under two prompts; one is rare for its prompt."""
    source = torch.Generator().manual_seed(seed)
    prompts = torch.arange(2000) % 2
    shares = torch.tensor([[0.1, 0.9], [1 - second_share, second_share]])
    attributes = [(torch.rand(2000, generator=source) < share[prompts]).long() for share in shares]
    probes = torch.randn(2, 2, 6, generator=source)
    null = 0.4 * torch.randn(2000, 2, 6, generator=source)
    for attribute, probe in zip(attributes, probes, strict=True):
        null += 2 * attribute[:, None, None] * probe
    return (
        Losses(null[..., :1] + 0.1 * torch.randn(2000, 2, 1, generator=source), null),
        prompts,
        attributes,
    )


@pytest.mark.parametrize("groups", [4, None])
def test_two_biases_give_the_four_pairs_of_their_groups(groups: int | None) -> None:
    losses, prompts, attributes = _losses(0.75)
    found = infer(losses, prompts, Settings(groups=groups))
    assert found.groups == 4
    assert found.second is not None
    assert found.second.bias_found
    first, second = (conflicting(prompts, attribute).long() for attribute in attributes)
    cells = torch.minimum(first + 2 * second, torch.tensor(3))
    # Which of the two is found first is open.
    numbered = found.result.assignments
    swapped = (numbered % 2) * 2 + numbered // 2
    assert max(adjusted_rand_index(a, cells) for a in (numbered, swapped)) > 0.95
    assert (found.soft.argmax(1) == numbered).double().mean() > 0.99
    torch.testing.assert_close(found.soft.sum(1), torch.ones(2000))


def test_a_second_attribute_that_all_prompts_share_alike_is_not_crossed() -> None:
    losses, prompts, attributes = _losses(0.5)
    found = infer(losses, prompts, Settings(groups=4))
    assert found.evidence.bias_found
    assert found.second is not None
    assert found.second.bias_found is False
    assert found.second_scores is None
    # The first attribute's scores are cut in four, within its two groups.
    upper = (found.scores > 0.5).long()
    assert adjusted_rand_index(upper, conflicting(prompts, attributes[0]).long()) > 0.95
    for group in range(4):
        assert upper[found.result.assignments == group].double().mean() in (0, 1)


def test_an_attribute_of_one_value_of_the_first_only_is_no_second_bias() -> None:
    # Such as the kind of wood, where most of one prompt's images and few of the other's show woods.
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(3000) % 2
    first = torch.rand(3000, generator=source) < torch.tensor([0.1, 0.9])[prompts]
    kind = first & (torch.rand(3000, generator=source) < 0.5)
    probes = torch.randn(2, 2, 6, generator=source)
    null = 0.4 * torch.randn(3000, 2, 6, generator=source)
    for attribute, probe in zip((first, kind), probes, strict=True):
        null += 2 * attribute[:, None, None] * probe
    found = infer(Losses(null[..., :1].clone(), null), prompts, Settings(groups=4))
    assert found.evidence.bias_found
    assert found.second is not None
    assert found.second.bias_found is False


@pytest.mark.parametrize("settings", [Settings(groups=2), Settings(groups=4, score="standardised")])
def test_a_second_attribute_is_looked_for_only_if_asked(settings: Settings) -> None:
    losses, prompts, _ = _losses(0.75)
    found = infer(losses, prompts, settings)
    assert found.second is None
    assert found.groups == (settings.groups or 2)
