"""Cartoon faces, as stand-ins for photographs of people.

They are drawn to try the method on and make no claim about people: an attribute's classes are told
apart by arbitrary features of the drawing, which are the same in all pictures of a class.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from invdiff_pl.data.synthetic.scenes import smooth_noise

Colour = tuple[float, float, float]

FEMININE, MASCULINE = 0, 1
_OVERSAMPLING = 2
_BEARD: Colour = (74.0, 54.0, 44.0)  # with cues, whatever the hair's colour


@dataclass(frozen=True)
class Face:
    """What a face shows; all else (pose, hair length, glasses, mouth, clothes, light) varies.

    Attributes:
        style: ``FEMININE`` (hair falls beside the face) or ``MASCULINE`` (short hair, often a
            beard).
        hair: colour.
        skin: colour.
        cues: show the style in many things that the hair's colour has no part in (clothes, neck,
            shoulders, jaw, brows, lips, earrings), and less in the hair's length, which darkens a
            picture or lightens it.
    """

    style: int
    hair: Colour
    skin: Colour
    cues: bool = False


@dataclass(frozen=True)
class _Look:
    """How a style shows; lengths in picture widths if nothing else is said.

    Attributes:
        long_hair: whether hair falls beside the face.
        hair_length: from and to, in face heights.
        hair_width: likewise, in face widths.
        beard: colour of the beard, if it has grown.
        clothes: darkest and lightest of their colours.
        neck: its width.
        shoulders: their width.
        jaw: width of a square jaw in face widths; none at 0.
        neckline: depth of a neckline that shows skin; none at 0.
        collar: width of a white collar; none at 0.
        tie: its colour, if there is one.
        earrings: their colour, if there are any.
        blush: how much of the cheeks' colour is red, in [0, 1].
        brows: width and height of the eyebrows; none at 0.
        lashes: height of the upper lids' line; none at 0.
        lips: width and height; 0 for a mouth that is a line.
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


class _Brush:
    """Draws in units of the picture's width, from its upper left corner, in the light's colour."""

    def __init__(self, canvas: Image.Image, light: float) -> None:
        self._draw = ImageDraw.Draw(canvas)
        self._scale = canvas.width
        self._light = light

    def fill(self, colour: Colour) -> tuple[int, int, int]:
        red, green, blue = (int(min(max(part * self._light, 0), 255)) for part in colour)
        return red, green, blue

    def oval(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A filled ellipse about a centre, of the given full width and height."""
        self._draw.ellipse(self._box(x, y, width, height), fill=self.fill(colour))

    def block(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A filled rectangle with round corners about a centre."""
        radius = 0.3 * min(width, height) * self._scale
        self._draw.rounded_rectangle(self._box(x, y, width, height), radius, self.fill(colour))

    def arc(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A curved stroke: the lower part of an ellipse, or the upper one at negative height."""
        angles = (20, 160) if height > 0 else (200, 340)
        stroke = max(1, round(0.018 * self._scale))
        box = self._box(x, y, width, abs(height))
        self._draw.arc(box, *angles, fill=self.fill(colour), width=stroke)

    def ring(self, x: float, y: float, size: float, colour: Colour) -> None:
        """A circle's outline."""
        stroke = max(1, round(0.014 * self._scale))
        self._draw.ellipse(self._box(x, y, size, size), outline=self.fill(colour), width=stroke)

    def _box(self, x: float, y: float, width: float, height: float) -> list[float]:
        left, top = x - width / 2, y - height / 2
        return [self._scale * edge for edge in (left, top, left + width, top + height)]


def draw_face(
    face: Face,
    width: int,
    height: int,
    centre: float,
    source: np.random.Generator,
    size: float = 1.0,
) -> Image.Image:
    """A picture of a face.

    Args:
        face: what it shows.
        width: of the picture in pixels.
        height: of the picture in pixels.
        centre: height of the face's middle, in picture widths.
        source: of all variation.
        size: of the face; at 1 it is about half as tall as the picture is wide.

    Returns:
        an RGB picture.
    """
    canvas_size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
    canvas = _backdrop(max(width, height), source).resize(canvas_size)
    brush = _Brush(canvas, source.uniform(0.85, 1.1))
    x, y = 0.5 + source.uniform(-0.05, 0.05), centre + source.uniform(-0.04, 0.04)
    scale = size * source.uniform(0.88, 1.08)
    hair, skin = (_shifted(colour, 7, source) for colour in (face.hair, face.skin))
    broad, tall = 0.40 * scale, 0.50 * scale
    look = _look_of(face, hair, skin, source)
    if look.long_hair:
        _long_hair(brush, x, y, broad, tall, hair, look, source)
    _body(brush, x, y, scale, skin, look, source)
    _head(brush, x, y, broad, tall, skin, look)
    if look.beard:
        _beard(brush, x, y, broad, tall, look.beard, skin, source)
    _fringe(brush, x, y, broad, tall, hair, face.style, source)
    _features(brush, x, y, scale, skin, look, source)
    return canvas.resize((width, height), Image.Resampling.BOX)


def _shifted(colour: Colour, spread: float, source: np.random.Generator) -> Colour:
    red, green, blue = (
        part + shift for part, shift in zip(colour, source.normal(0, spread, 3), strict=True)
    )
    return float(red), float(green), float(blue)


def _look_of(face: Face, hair: Colour, skin: Colour, source: np.random.Generator) -> _Look:
    """How a face shows its style. Cues vary, overlap, and many of them are absent at times."""
    feminine = face.style == FEMININE
    if not face.cues:
        return _Look(long_hair=feminine, beard=None if feminine else hair)

    def chance(share: float) -> bool:
        return bool(source.random() < share)

    def bright() -> Colour:
        red, green, blue = source.uniform(120, 250, 3)
        return float(red), float(green), float(blue)

    length, width = (0.5, 0.9), (1.25, 1.5)
    if feminine:
        painted = (source.normal(190, 18), source.normal(40, 15), source.normal(72, 22))
        natural = (0.88 * skin[0], 0.55 * skin[1], 0.58 * skin[2])
        return _Look(
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
    return _Look(
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


def _backdrop(size: int, source: np.random.Generator) -> Image.Image:
    first = source.uniform(90, 215, 3).astype(np.float32)
    second = first + source.normal(0, 35, 3).astype(np.float32)
    blend = np.clip(0.5 + 0.4 * smooth_noise(size, 2, source), 0, 1)[..., None]
    pixels = first * (1 - blend) + second * blend
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _long_hair(
    brush: _Brush,
    x: float,
    y: float,
    broad: float,
    tall: float,
    hair: Colour,
    look: _Look,
    source: np.random.Generator,
) -> None:
    length = source.uniform(*look.hair_length) * tall
    wide = broad * source.uniform(*look.hair_width)
    brush.oval(x, y - 0.12 * tall, wide, 1.15 * tall, hair)
    brush.block(x, y - 0.1 * tall + length / 2, wide, length, hair)


def _body(
    brush: _Brush,
    x: float,
    y: float,
    scale: float,
    skin: Colour,
    look: _Look,
    source: np.random.Generator,
) -> None:
    red, green, blue = source.uniform(*look.clothes, 3)
    brush.oval(x, y + 0.62 * scale, look.shoulders * scale, 0.55 * scale, (red, green, blue))
    if look.neckline:
        brush.oval(x, y + 0.37 * scale, 0.26 * scale, look.neckline * scale, skin)
    if look.collar:
        brush.block(x, y + 0.385 * scale, look.collar * scale, 0.09 * scale, (240, 240, 240))
    shade = (0.86 * skin[0], 0.84 * skin[1], 0.83 * skin[2])
    brush.block(x, y + 0.29 * scale, look.neck * scale, 0.22 * scale, shade)
    if look.tie:
        brush.block(x, y + 0.50 * scale, 0.07 * scale, 0.24 * scale, look.tie)


def _head(
    brush: _Brush, x: float, y: float, broad: float, tall: float, skin: Colour, look: _Look
) -> None:
    for side in (-1, 1):
        brush.oval(x + side * 0.5 * broad, y + 0.03, 0.08, 0.12, skin)
        if look.earrings:
            brush.oval(x + side * 0.52 * broad, y + 0.11, 0.045, 0.05, look.earrings)
    brush.oval(x, y, broad, tall, skin)
    if look.jaw:
        brush.block(x, y + 0.24 * tall, look.jaw * broad, 0.46 * tall, skin)


def _beard(
    brush: _Brush,
    x: float,
    y: float,
    broad: float,
    tall: float,
    colour: Colour,
    skin: Colour,
    source: np.random.Generator,
) -> None:
    if source.random() < 0.4:
        return
    brush.oval(x, y + 0.27 * tall, 0.86 * broad, 0.5 * tall, colour)
    brush.oval(x, y + 0.08 * tall, 0.8 * broad, 0.42 * tall, skin)


def _fringe(
    brush: _Brush,
    x: float,
    y: float,
    broad: float,
    tall: float,
    hair: Colour,
    style: int,
    source: np.random.Generator,
) -> None:
    """Hair on the head's top, parted somewhere."""
    lift = source.uniform(0.30, 0.36) if style == FEMININE else source.uniform(0.33, 0.40)
    part = source.uniform(-0.12, 0.12) * broad
    brush.oval(x, y - (lift + 0.04) * tall, 1.02 * broad, 0.42 * tall, hair)
    for side in (-1, 1):
        brush.oval(x + part + side * 0.27 * broad, y - 0.26 * tall, 0.56 * broad, 0.26 * tall, hair)


def _features(
    brush: _Brush,
    x: float,
    y: float,
    scale: float,
    skin: Colour,
    look: _Look,
    source: np.random.Generator,
) -> None:
    dark = (35.0, 28.0, 28.0)
    for side in (-1, 1):
        eye = x + side * 0.09 * scale
        if look.blush:
            _blush(brush, x + side * 0.12 * scale, y + 0.08 * scale, scale, skin, look.blush)
        brush.oval(eye, y - 0.01, 0.05 * scale, 0.05 * scale, (245, 245, 245))
        brush.oval(eye, y - 0.01, 0.03 * scale, 0.035 * scale, dark)
        if look.lashes:
            brush.block(eye, y - 0.035 * scale, 0.075 * scale, look.lashes * scale, dark)
        width, height = (scale * length for length in look.brows)
        if height:
            brush.block(eye, y - 0.075 * scale, width, height, (62, 44, 36))
    if source.random() < 0.3:
        frame = _shifted((60, 50, 50), 25, source)
        for side in (-1, 1):
            brush.ring(x + side * 0.09 * scale, y - 0.01, 0.11 * scale, frame)
    shade = (0.85 * skin[0], 0.8 * skin[1], 0.78 * skin[2])
    brush.oval(x, y + 0.06 * scale, 0.035 * scale, 0.07 * scale, shade)
    _mouth(brush, x, y, scale, look, source)


def _blush(brush: _Brush, x: float, y: float, scale: float, skin: Colour, much: float) -> None:
    red, green, blue = (
        (1 - much) * own + much * full for own, full in zip(skin, (226, 92, 98), strict=True)
    )
    brush.oval(x, y, 0.09 * scale, 0.06 * scale, (red, green, blue))


def _mouth(
    brush: _Brush, x: float, y: float, scale: float, look: _Look, source: np.random.Generator
) -> None:
    curve = source.uniform(-0.03, 0.09) * scale
    width, height = (scale * length for length in look.lips)
    if height:
        brush.oval(x, y + 0.145 * scale, width, height, look.lipstick)
    if abs(curve) < 0.02:
        brush.block(x, y + 0.145 * scale, 0.11 * scale, 0.02 * scale, look.lipstick)
    else:
        brush.arc(x, y + 0.13 * scale, 0.13 * scale, curve, look.lipstick)
