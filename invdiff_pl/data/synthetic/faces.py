"""Cartoon faces, as stand-ins for photographs of people.

They are drawn to try the method on and make no claim about people: an attribute's classes are told
apart by arbitrary features of the drawing, which are the same in all pictures of a class.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from invdiff_pl.data.synthetic.looks import FEMININE, Colour, Face, Look, look_of, shifted
from invdiff_pl.data.synthetic.scenes import smooth_noise

_OVERSAMPLING = 2


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
    """Draw a picture of a face.

    Args:
        face: what it shows.
        width: width of the picture in pixels.
        height: height of the picture in pixels.
        centre: height of the face's middle, in picture widths.
        source: source of all variation.
        size: size of the face; at 1 it is about half as tall as the picture is wide.

    Returns:
        an RGB picture.
    """
    canvas_size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
    canvas = _backdrop(max(width, height), source).resize(canvas_size)
    brush = _Brush(canvas, source.uniform(0.85, 1.1))
    x, y = 0.5 + source.uniform(-0.05, 0.05), centre + source.uniform(-0.04, 0.04)
    scale = size * source.uniform(0.88, 1.08)
    hair, skin = (shifted(colour, 7, source) for colour in (face.hair, face.skin))
    look = look_of(face, hair, skin, source)
    _Painter(brush, x, y, scale, hair, skin, look, source).paint(face.style)
    return canvas.resize((width, height), Image.Resampling.BOX)


def _backdrop(size: int, source: np.random.Generator) -> Image.Image:
    first = source.uniform(90, 215, 3).astype(np.float32)
    second = first + source.normal(0, 35, 3).astype(np.float32)
    blend = np.clip(0.5 + 0.4 * smooth_noise(size, 2, source), 0, 1)[..., None]
    pixels = first * (1 - blend) + second * blend
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class _Painter:
    """Paints a face about a point.

    Attributes:
        brush: brush that paints.
        x: horizontal position of the face's middle.
        y: vertical position of the face's middle.
        scale: scale of the face.
        hair: colour of the hair.
        skin: colour of the skin.
        look: all else that the face shows.
        source: source of all variation.
    """

    brush: _Brush
    x: float
    y: float
    scale: float
    hair: Colour
    skin: Colour
    look: Look
    source: np.random.Generator

    @property
    def broad(self) -> float:
        return 0.40 * self.scale

    @property
    def tall(self) -> float:
        return 0.50 * self.scale

    def paint(self, style: int) -> None:
        """Paint all of the face, from back to front."""
        if self.look.long_hair:
            self._long_hair()
        self._body()
        self._head()
        if self.look.beard:
            self._beard(self.look.beard)
        self._fringe(style)
        self._features()

    def _long_hair(self) -> None:
        brush, x, y, broad = self.brush, self.x, self.y, self.broad
        tall, hair, look, source = self.tall, self.hair, self.look, self.source
        length = source.uniform(*look.hair_length) * tall
        wide = broad * source.uniform(*look.hair_width)
        brush.oval(x, y - 0.12 * tall, wide, 1.15 * tall, hair)
        brush.block(x, y - 0.1 * tall + length / 2, wide, length, hair)

    def _body(self) -> None:
        brush, x, y, scale = self.brush, self.x, self.y, self.scale
        skin, look, source = self.skin, self.look, self.source
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

    def _head(self) -> None:
        brush, x, y, broad = self.brush, self.x, self.y, self.broad
        tall, skin, look = self.tall, self.skin, self.look
        for side in (-1, 1):
            brush.oval(x + side * 0.5 * broad, y + 0.03, 0.08, 0.12, skin)
            if look.earrings:
                brush.oval(x + side * 0.52 * broad, y + 0.11, 0.045, 0.05, look.earrings)
        brush.oval(x, y, broad, tall, skin)
        if look.jaw:
            brush.block(x, y + 0.24 * tall, look.jaw * broad, 0.46 * tall, skin)

    def _beard(self, colour: Colour) -> None:
        brush, x, y, broad = self.brush, self.x, self.y, self.broad
        tall, skin, source = self.tall, self.skin, self.source
        if source.random() < 0.4:
            return
        brush.oval(x, y + 0.27 * tall, 0.86 * broad, 0.5 * tall, colour)
        brush.oval(x, y + 0.08 * tall, 0.8 * broad, 0.42 * tall, skin)

    def _fringe(self, style: int) -> None:
        """Hair on the head's top, parted somewhere."""
        brush, x, y, broad = self.brush, self.x, self.y, self.broad
        tall, hair, source = self.tall, self.hair, self.source
        lift = source.uniform(0.30, 0.36) if style == FEMININE else source.uniform(0.33, 0.40)
        part = source.uniform(-0.12, 0.12) * broad
        brush.oval(x, y - (lift + 0.04) * tall, 1.02 * broad, 0.42 * tall, hair)
        for side in (-1, 1):
            brush.oval(
                x + part + side * 0.27 * broad, y - 0.26 * tall, 0.56 * broad, 0.26 * tall, hair
            )

    def _features(self) -> None:
        brush, x, y, scale = self.brush, self.x, self.y, self.scale
        skin, look, source = self.skin, self.look, self.source
        dark = (35.0, 28.0, 28.0)
        for side in (-1, 1):
            eye = x + side * 0.09 * scale
            if look.blush:
                self._blush(x + side * 0.12 * scale, y + 0.08 * scale, look.blush)
            brush.oval(eye, y - 0.01, 0.05 * scale, 0.05 * scale, (245, 245, 245))
            brush.oval(eye, y - 0.01, 0.03 * scale, 0.035 * scale, dark)
            if look.lashes:
                brush.block(eye, y - 0.035 * scale, 0.075 * scale, look.lashes * scale, dark)
            width, height = (scale * length for length in look.brows)
            if height:
                brush.block(eye, y - 0.075 * scale, width, height, (62, 44, 36))
        if source.random() < 0.3:
            frame = shifted((60, 50, 50), 25, source)
            for side in (-1, 1):
                brush.ring(x + side * 0.09 * scale, y - 0.01, 0.11 * scale, frame)
        shade = (0.85 * skin[0], 0.8 * skin[1], 0.78 * skin[2])
        brush.oval(x, y + 0.06 * scale, 0.035 * scale, 0.07 * scale, shade)
        self._mouth()

    def _blush(self, x: float, y: float, much: float) -> None:
        brush, scale, skin = self.brush, self.scale, self.skin
        red, green, blue = (
            (1 - much) * own + much * full for own, full in zip(skin, (226, 92, 98), strict=True)
        )
        brush.oval(x, y, 0.09 * scale, 0.06 * scale, (red, green, blue))

    def _mouth(self) -> None:
        brush, x, y, scale = self.brush, self.x, self.y, self.scale
        look, source = self.look, self.source
        curve = source.uniform(-0.03, 0.09) * scale
        width, height = (scale * length for length in look.lips)
        if height:
            brush.oval(x, y + 0.145 * scale, width, height, look.lipstick)
        if abs(curve) < 0.02:
            brush.block(x, y + 0.145 * scale, 0.11 * scale, 0.02 * scale, look.lipstick)
        else:
            brush.arc(x, y + 0.13 * scale, 0.13 * scale, curve, look.lipstick)
