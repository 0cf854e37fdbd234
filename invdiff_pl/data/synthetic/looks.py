"""How the styles of cartoon faces show: clothes, neck, jaw, brows, lips and hair."""

from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]

FEMININE, MASCULINE = 0, 1
_BEARD: Colour = (74.0, 54.0, 44.0)  # with cues, whatever the hair's colour


@dataclass(frozen=True)
class Face:
    """What a face shows; all else (pose, hair length, glasses, mouth, clothes, light) varies.

    Attributes:
        style: ``FEMININE`` (hair falls beside the face) or ``MASCULINE`` (short hair, often a
            beard).
        hair: colour of the hair.
        skin: colour of the skin.
        cues: whether the style shows in many things that the hair's colour has no part in (clothes,
            neck, shoulders, jaw, brows, lips, earrings), and less in the hair's length, which
            darkens or lightens a picture.
    """

    style: int
    hair: Colour
    skin: Colour
    cues: bool = False


@dataclass(frozen=True)
class Look:
    """How a style shows; lengths are in picture widths unless stated otherwise.

    Attributes:
        long_hair: whether hair falls beside the face.
        hair_length: range of the hair's length, in face heights.
        hair_width: range of the hair's width, in face widths.
        beard: colour of the beard, if it has grown.
        clothes: darkest and lightest of their colours.
        neck: width of the neck.
        shoulders: width of the shoulders.
        jaw: width of a square jaw in face widths; none at 0.
        neckline: depth of a neckline that shows skin; none at 0.
        collar: width of a white collar; none at 0.
        tie: colour of the tie, if there is one.
        earrings: colour of the earrings, if there are any.
        blush: how much of the cheeks' colour is red, in [0, 1].
        brows: width and height of the eyebrows; none at 0.
        lashes: height of the upper lids' line; none at 0.
        lips: width and height of the lips; 0 for a mouth that is a line.
        lipstick: colour of the lips.
    """

    long_hair: bool
    hair_length: tuple[float, float] = (0.85, 1.25)
    hair_width: tuple[float, float] = (1.55, 1.8)
    beard: Colour | None = None
    clothes: tuple[float, float] = (30, 230)
    neck: float = 0.17
    shoulders: float = 0.92
    jaw: float = 0.0
    neckline: float = 0.0
    collar: float = 0.0
    tie: Colour | None = None
    earrings: Colour | None = None
    blush: float = 0.0
    brows: tuple[float, float] = (0.0, 0.0)
    lashes: float = 0.0
    lips: tuple[float, float] = (0.0, 0.0)
    lipstick: Colour = (165.0, 70.0, 70.0)


def shifted(colour: Colour, spread: float, source: np.random.Generator) -> Colour:
    """A colour near another one."""
    red, green, blue = (
        part + shift for part, shift in zip(colour, source.normal(0, spread, 3), strict=True)
    )
    return float(red), float(green), float(blue)


def look_of(face: Face, hair: Colour, skin: Colour, source: np.random.Generator) -> Look:
    """Draw how a face shows its style; cues vary, overlap, and many are absent at times."""
    feminine = face.style == FEMININE
    if not face.cues:
        return Look(long_hair=feminine, beard=None if feminine else hair)

    def chance(share: float) -> bool:
        return bool(source.random() < share)

    def bright() -> Colour:
        red, green, blue = source.uniform(120, 250, 3)
        return float(red), float(green), float(blue)

    length, width = (0.5, 0.9), (1.25, 1.5)
    if feminine:
        painted = (source.normal(190, 18), source.normal(40, 15), source.normal(72, 22))
        natural = (0.88 * skin[0], 0.55 * skin[1], 0.58 * skin[2])
        return Look(
            long_hair=chance(0.5),
            hair_length=length,
            hair_width=width,
            clothes=(80, 245),
            neck=source.normal(0.145, 0.014),
            shoulders=source.normal(0.72, 0.05),
            neckline=source.uniform(0.16, 0.32) if chance(0.7) else 0.0,
            earrings=bright() if chance(0.6) else None,
            blush=source.uniform(0.1, 0.45) if chance(0.7) else 0.0,
            brows=(source.uniform(0.07, 0.10), source.uniform(0.008, 0.014)),
            lashes=source.uniform(0.008, 0.02),
            lips=(source.uniform(0.10, 0.14), source.uniform(0.035, 0.06)),
            lipstick=painted if chance(0.75) else natural,
        )
    return Look(
        long_hair=chance(0.2),
        hair_length=length,
        hair_width=width,
        beard=_BEARD,
        clothes=(20, 170),
        neck=source.normal(0.215, 0.018),
        shoulders=source.normal(1.12, 0.06),
        jaw=source.uniform(0.80, 0.95),
        collar=source.uniform(0.22, 0.30) if chance(0.5) else 0.0,
        tie=bright() if chance(0.4) else None,
        brows=(source.uniform(0.09, 0.13), source.uniform(0.022, 0.04)),
        lips=(source.uniform(0.09, 0.14), source.uniform(0.014, 0.024)),
        lipstick=(0.74 * skin[0], 0.60 * skin[1], 0.58 * skin[2]),
    )
