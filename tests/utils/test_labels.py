"""What stands for prompts in pictures."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

from invdiff_pl.utils.labels import drawable, font, legend, plain, prompt_label

PROMPTS = [
    "a photo of a cat",
    "кошка на траве",
    "صورة قطة",
    "一张猫的照片",
    "🐶 dog",
    "a\nb\tc",
    "x" * 400,
    "\n",
    "$5 and $\\frac{",
]
LABELS = [
    *("a cat", "кошка на траве", "صورة قطة", "prompt 3", "prompt 4", "a b c"),
    *(f"6: {'x' * 20}…", "prompt 7", "$5 and $\\frac{"),
]


@pytest.mark.parametrize(("number", "label"), list(enumerate(LABELS)))
def test_prompts_are_shown_as_they_are_where_the_font_has_their_letters(number, label) -> None:
    assert prompt_label(PROMPTS[number], number) == label
    assert len(label) <= 24


def test_the_legend_tells_what_the_numbers_stand_for() -> None:
    assert legend(PROMPTS) == [(number, PROMPTS[number]) for number in (3, 4, 6, 7)]
    assert legend(["prompt", "prompting 1"]) == []


def test_every_label_has_glyphs() -> None:
    """The empty box that stands for a missing letter is drawn for none of them."""

    def drawn(text: str) -> bytes:
        image = Image.new("L", (300, 40), 255)
        ImageDraw.Draw(image).text((4, 4), text, fill=0, font=font(15))
        return np.asarray(image).tobytes()

    box = drawn("\uffff")
    labels = [prompt_label(prompt, number) for number, prompt in enumerate(PROMPTS)]
    letters = {character for label in labels for character in label if not character.isspace()}
    assert all(drawn(letter) != box for letter in letters)
    assert drawn("猫") == box
    assert not drawable("猫")


def test_matplotlib_takes_any_prompt_for_text(tmp_path: Path) -> None:
    figure, axes = plt.subplots()
    axes.set_xticks(range(len(PROMPTS)), [plain(prompt) for prompt in PROMPTS])
    axes.set_title(plain("$\\nothing$ 猫"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of glyphs that are missing
        figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    assert plain("猫 $1") == r"? \$1"
