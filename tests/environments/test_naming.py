"""Words for groups, by an encoder whose words and pictures are known."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.environments.discovery import Discovery
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings, find_hidden_attributes
from invdiff_pl.environments.naming import words_of

WORDS = ("red", "green", "blue")


class _Colours:
    """Sees the mean colour of a picture, and knows three words."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.eye(3)[[WORDS.index(prompt.split()[-1]) for prompt in prompts]]

    def encode_images(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.float().mean((2, 3)) + 1, dim=1)


@pytest.fixture(scope="module")
def found() -> Discovery:
    """Pictures that are red or blue, in other shares of either prompt; the second is greener."""
    source = torch.Generator().manual_seed(0)
    numbers = torch.arange(400) % 2
    red = torch.rand(400, generator=source) < torch.tensor([0.1, 0.9])[numbers]
    pixels = 0.1 * torch.rand((400, 3, 8, 8), generator=source)
    pixels[red, 0] += 0.8
    pixels[~red, 2] += 0.8
    pixels[numbers == 1, 1] += 0.5
    images = PromptedImages(pixels, [("a", "b")[n] for n in numbers.tolist()])
    settings = HiddenAttributeSettings(
        components=3, starts=6, values=(), alpha=0.5, resamples=1, candidates=1
    )
    features = pixels.mean((2, 3)) + 0.02 * torch.randn((400, 3), generator=source)
    return Discovery(find_hidden_attributes(features, images.prompt_ids, settings), images)


def test_groups_are_named_by_what_tells_them_apart_and_not_by_what_prompts_name(
    found: Discovery,
) -> None:
    named = found.named(_Colours(), WORDS, resolution=8)
    names = named[0].names
    red = int(found[0].shares[1].argmax())
    assert names[red].split(", ")[0] == "red"
    assert names[1 - red].split(", ")[0] == "blue"
    assert named[0].facts()["names"] == list(names)
    assert named.chosen == found.chosen


def test_words_of_captions_are_those_with_letters_enough() -> None:
    assert words_of(["A photo of a cat, 2 m", "a Katze über x_1"]) == (
        "Katze",
        "cat",
        "photo",
        "über",
    )
