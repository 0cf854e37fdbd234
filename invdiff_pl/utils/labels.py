"""Prompts and names in pictures, shown as text if the font has their letters, else by number."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib as mpl
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

# Ships with matplotlib, which draws plots in it: Latin, Greek, Cyrillic, Arabic and more, but
# neither Chinese, Japanese and Korean nor most emoji.
_FONT = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
MOST = 24  # characters of a prompt shown in a picture


def font(size: float) -> ImageFont.FreeTypeFont:
    """Return the font for Pillow at a size in pixels."""
    return ImageFont.truetype(_FONT, size)


def drawable(text: str) -> bool:
    """Return whether the font has a letter for every character.

    Example:
        >>> drawable("кошка"), drawable("猫")
        (True, False)
    """
    return all(character in _characters() for character in text)


@cache
def _characters() -> frozenset[str]:
    return frozenset(map(chr, FT2Font(_FONT).get_charmap()))


def prompt_label(prompt: str, number: int, most: int = MOST) -> str:
    """Return the label that stands for a prompt in a picture.

    Args:
        prompt: a prompt of any length and script.
        number: number of the prompt, from 0, as in ``manifest.jsonl``.
        most: largest number of characters.

    Returns:
        the prompt on one line without "a photo of"; cut, with its number, if it is too long; or its
        number alone if the font lacks a letter. See :func:`legend` for the numbers.

    Example:
        >>> prompt_label("a photo of a mallard", 3), prompt_label("一张猫的照片", 4)
        ('a mallard', 'prompt 4')
    """
    words = " ".join(prompt.split()).removeprefix("a photo of ")
    if not words or not drawable(words):
        return f"prompt {number}"
    if len(words) <= most:
        return words
    start = f"{number}: "
    return f"{start}{words[: most - len(start) - 1]}…"


def legend(prompts: Sequence[str]) -> list[tuple[int, str]]:
    """Return the numbers and texts of prompts that pictures show by number."""
    return [
        (number, prompt)
        for number, prompt in enumerate(prompts)
        if re.match(rf"(prompt )?{number}(: |$)", prompt_label(prompt, number))
    ]


def plain(text: str, instead: str = "?") -> str:
    """Escape a text for matplotlib, so that a dollar sign does not start a formula.

    Args:
        text: text in any script.
        instead: replacement of characters that the font lacks.
    """
    shown = "".join(c if drawable(c) else instead for c in " ".join(text.split()))
    return shown.replace("$", r"\$")
