"""Drawn birds on drawn scenes, in the file layout of the published Waterbirds data set."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from invdiff_pl.data.synthetic.scenes import LAND, WATER, draw_scene
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path
from invdiff_pl.utils.progress import track

_OVERSAMPLING = 4
# Images of landbirds and waterbirds in the published train, val and test splits (Sagawa et al.,
# arXiv 1911.08731, and the metadata.csv of waterbird_complete95_forest2water2).
_PUBLISHED = ((3682, 1113), (933, 266), (4510, 1284))
_HEADER = ("img_id", "img_filename", "y", "split", "place", "place_filename")
# Factors of red and blue in a warm and a cool picture, at full strength.
_TINTS = ((1.25, 0.75), (0.75, 1.25))
_LEAST_TINT = 0.5
_SCENE_FILES = ("/f/forest_path/00000001.jpg", "/o/ocean/00000001.jpg")

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class RenderedWaterbirds:
    """What to draw.

    Attributes:
        size: side of the pictures in pixels.
        correlation: share of each species' train pictures on its own background.
        evaluation_correlation: the same in val and test.
        fraction: fraction of the published split sizes (4795, 1199 and 5794 pictures).
        seed: the same seed gives the same bytes.
        tint_correlation: a second bias: share of each species' train pictures in its own light,
            warm for landbirds and cool for waterbirds, on either background alike. Then
            ``metadata.csv`` has a column ``tint`` (0 warm, 1 cool), for scoring only. ``None`` for
            no tint.

    Raises:
        InvDiffError: if a setting is out of range.
    """

    size: int = 32
    correlation: float = 0.95
    evaluation_correlation: float = 0.5
    fraction: float = 1.0
    seed: int = 0
    tint_correlation: float | None = None

    def __post_init__(self) -> None:
        if self.size < 16:
            raise InvDiffError(
                f"size={self.size}: pictures need at least 16 pixels per side.", "size"
            )
        for name in ("correlation", "evaluation_correlation", "tint_correlation"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InvDiffError(f"{name}={value}: expected a share from 0 to 1.", name)
        if not 0 < self.fraction <= 1:
            raise InvDiffError(
                f"fraction={self.fraction}: expected a share above 0, at most 1.", "fraction"
            )
        if self.seed < 0:
            raise InvDiffError(f"seed={self.seed}: expected a whole number from 0 on.", "seed")


@dataclass(frozen=True)
class Picture:
    """One row of ``metadata.csv``."""

    number: int
    file: str
    species: int
    kind: int
    split: int
    place: int
    tint: int | None = None


class Pen:
    """Draws in the bird's own coordinates: x forward, y down, the body about one unit long."""

    def __init__(self, canvas: Image.Image, source: np.random.Generator) -> None:
        side = canvas.width
        self._draw = ImageDraw.Draw(canvas)
        self._scale = side * source.uniform(0.40, 0.56)
        turn = source.uniform(-0.14, 0.14)
        mirror = -1 if source.random() < 0.5 else 1
        self._axes = np.array(
            [[mirror * np.cos(turn), mirror * -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        )
        self._centre = side * (0.5 + source.uniform(-0.07, 0.07, 2))
        self._shift = source.normal(0, 10, 3)

    def shape(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """A filled polygon."""
        placed = np.array(points) @ self._axes.T * self._scale + self._centre
        shifted = np.clip(np.array(colour) + self._shift, 0, 255).astype(int)
        self._draw.polygon([tuple(point) for point in placed], fill=tuple(shifted))

    def oval(
        self, x: float, y: float, width: float, height: float, colour: Colour, turn: float = 0.0
    ) -> None:
        """A filled ellipse of the given full width and height."""
        angles = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        across, down = width / 2 * np.cos(angles), height / 2 * np.sin(angles)
        cos, sin = np.cos(turn), np.sin(turn)
        xs, ys = x + cos * across - sin * down, y + sin * across + cos * down
        self.shape(list(zip(xs.tolist(), ys.tolist(), strict=True)), colour)

    def line(self, points: list[tuple[float, float]], width: float, colour: Colour) -> None:
        """A thick line with round joints."""
        for (x0, y0), (x1, y1) in pairwise(points):
            length = float(np.hypot(x1 - x0, y1 - y0)) or 1.0
            dx, dy = (y0 - y1) / length * width / 2, (x1 - x0) / length * width / 2
            corners = [(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy)]
            self.shape([*corners, (x0 - dx, y0 - dy)], colour)
        for x, y in points:
            self.oval(x, y, width, width, colour)


def _eye(pen: Pen, x: float, y: float, colour: Colour = (15, 15, 15)) -> None:
    pen.oval(x, y, 0.07, 0.07, colour)


def _legs(pen: Pen, x: float, top: float, length: float, colour: Colour) -> None:
    pen.line([(x - 0.07, top), (x - 0.09, top + length)], 0.045, colour)
    pen.line([(x + 0.09, top), (x + 0.1, top + length)], 0.045, colour)


def _cardinal(pen: Pen) -> None:
    red, dark = (205, 30, 35), (150, 20, 28)
    _legs(pen, 0.0, 0.25, 0.2, (90, 55, 45))
    pen.shape([(-0.25, 0.0), (-0.75, 0.42), (-0.66, 0.52), (-0.15, 0.25)], dark)
    pen.oval(0.0, 0.06, 0.72, 0.52, red, -0.45)
    pen.oval(0.26, -0.27, 0.38, 0.36, red)
    pen.shape([(0.12, -0.38), (0.1, -0.74), (0.4, -0.38)], red)
    pen.oval(-0.12, 0.08, 0.46, 0.24, dark, -0.5)
    pen.oval(0.38, -0.22, 0.18, 0.22, (20, 15, 15))
    pen.shape([(0.42, -0.32), (0.66, -0.21), (0.42, -0.12)], (240, 130, 40))
    _eye(pen, 0.29, -0.32)


def _goldfinch(pen: Pen) -> None:
    yellow, black = (248, 215, 35), (25, 25, 25)
    _legs(pen, 0.02, 0.25, 0.2, (170, 120, 80))
    pen.shape([(-0.3, 0.02), (-0.72, 0.2), (-0.7, 0.32), (-0.2, 0.22)], black)
    pen.oval(0.0, 0.04, 0.76, 0.56, yellow, -0.25)
    pen.oval(0.28, -0.22, 0.4, 0.4, yellow)
    pen.oval(0.32, -0.36, 0.28, 0.15, black, 0.3)
    pen.oval(-0.18, 0.05, 0.46, 0.24, black, 0.25)
    pen.line([(-0.32, 0.0), (-0.04, 0.1)], 0.05, (245, 245, 240))
    pen.shape([(0.45, -0.27), (0.64, -0.18), (0.45, -0.12)], (235, 140, 90))
    _eye(pen, 0.34, -0.23)


def _raven(pen: Pen) -> None:
    black, sheen = (22, 22, 28), (62, 62, 82)
    _legs(pen, 0.0, 0.26, 0.22, (15, 15, 15))
    pen.shape([(-0.3, -0.02), (-0.86, 0.22), (-0.8, 0.4), (-0.2, 0.28)], black)
    pen.oval(-0.02, 0.06, 0.86, 0.5, black, -0.3)
    pen.oval(0.34, -0.25, 0.38, 0.34, black)
    pen.shape([(0.44, -0.38), (0.82, -0.2), (0.44, -0.14)], (40, 40, 44))
    pen.oval(-0.16, 0.04, 0.5, 0.18, sheen, 0.2)
    _eye(pen, 0.38, -0.28, (225, 225, 225))


def _mallard(pen: Pen) -> None:
    pen.shape([(-0.42, 0.0), (-0.76, -0.14), (-0.7, 0.16), (-0.4, 0.25)], (238, 238, 232))
    pen.oval(-0.04, 0.14, 0.98, 0.46, (170, 165, 158))
    pen.oval(0.28, 0.16, 0.36, 0.36, (105, 58, 38))
    pen.line([(0.32, 0.05), (0.36, -0.22)], 0.22, (20, 105, 70))
    pen.line([(0.28, -0.01), (0.42, 0.0)], 0.07, (245, 245, 245))
    pen.oval(0.4, -0.3, 0.34, 0.32, (20, 110, 72))
    pen.shape([(0.53, -0.34), (0.86, -0.22), (0.53, -0.16)], (245, 195, 40))
    pen.oval(-0.2, 0.1, 0.5, 0.2, (120, 98, 80))
    pen.shape([(-0.26, 0.12), (-0.05, 0.1), (-0.05, 0.19), (-0.26, 0.2)], (60, 90, 190))
    _eye(pen, 0.42, -0.34)


def _flamingo(pen: Pen) -> None:
    pink, deep = (250, 140, 165), (225, 85, 125)
    pen.line([(-0.12, 0.1), (-0.14, 0.82)], 0.05, deep)
    pen.line([(0.02, 0.1), (0.14, 0.44), (0.02, 0.82)], 0.05, deep)
    pen.shape([(-0.3, -0.05), (-0.62, 0.16), (-0.2, 0.2)], deep)
    pen.oval(-0.08, 0.02, 0.68, 0.38, pink, -0.15)
    pen.oval(-0.18, 0.05, 0.4, 0.2, deep, 0.1)
    neck = [(0.16, 0.0), (0.4, -0.12), (0.36, -0.38), (0.26, -0.58), (0.38, -0.76)]
    pen.line(neck, 0.11, pink)
    pen.oval(0.43, -0.76, 0.22, 0.18, pink)
    pen.shape([(0.5, -0.82), (0.68, -0.66), (0.58, -0.56), (0.5, -0.7)], (30, 25, 30))
    _eye(pen, 0.44, -0.79)


def _swan(pen: Pen) -> None:
    white, shade = (248, 248, 246), (208, 212, 220)
    pen.shape([(-0.36, 0.05), (-0.8, -0.12), (-0.62, 0.3), (-0.3, 0.32)], white)
    pen.oval(-0.08, 0.18, 0.96, 0.48, white)
    pen.oval(-0.2, 0.1, 0.62, 0.3, shade, 0.2)
    pen.oval(-0.18, 0.06, 0.58, 0.26, white, 0.2)
    neck = [(0.3, 0.15), (0.46, -0.06), (0.42, -0.32), (0.32, -0.52), (0.42, -0.68)]
    pen.line(neck, 0.14, white)
    pen.oval(0.46, -0.66, 0.26, 0.2, white)
    pen.shape([(0.56, -0.7), (0.8, -0.56), (0.56, -0.58)], (240, 120, 30))
    pen.line([(0.52, -0.68), (0.58, -0.62)], 0.06, (20, 20, 20))
    _eye(pen, 0.47, -0.7)


@dataclass(frozen=True)
class Species:
    """A drawn species: its folder's name, where it is at home, and how it is drawn."""

    name: str
    kind: int
    draw: Callable[[Pen], None]


SPECIES = (
    Species("Northern_cardinal", LAND, _cardinal),
    Species("American_goldfinch", LAND, _goldfinch),
    Species("Common_raven", LAND, _raven),
    Species("Mallard", WATER, _mallard),
    Species("Greater_flamingo", WATER, _flamingo),
    Species("Mute_swan", WATER, _swan),
)


def plan_pictures(settings: RenderedWaterbirds) -> list[Picture]:
    """The rows of ``metadata.csv``: published proportions, the correlation in every species."""
    pictures: list[Picture] = []
    for split, counts in enumerate(_PUBLISHED):
        correlation = settings.evaluation_correlation if split else settings.correlation
        for kind, published in enumerate(counts):
            # Two, so that each background can have one.
            places = _places(max(2, round(published * settings.fraction)), kind, correlation)
            members = [number for number, species in enumerate(SPECIES) if species.kind == kind]
            for position, place in enumerate(places):
                species = members[position % len(members)]
                folder = f"{species + 1:03d}.{SPECIES[species].name}"
                number = len(pictures)
                file = f"{folder}/{SPECIES[species].name}_{number:05d}.png"
                pictures.append(Picture(number, file, species, kind, split, place))
    return pictures if settings.tint_correlation is None else _tinted(pictures, settings)


def _tinted(pictures: list[Picture], settings: RenderedWaterbirds) -> list[Picture]:
    """The pictures with tints, in the same shares on each background of a species."""
    cells: dict[tuple[int, int, int], list[Picture]] = {}
    for picture in pictures:
        cells.setdefault((picture.split, picture.species, picture.place), []).append(picture)
    tinted = []
    for (split, *_), members in cells.items():
        correlation = settings.evaluation_correlation if split else settings.tint_correlation
        assert correlation is not None
        own = int(len(members) * correlation + 0.5)
        for position, picture in enumerate(members):
            tint = picture.kind if position < own else 1 - picture.kind
            tinted.append(replace(picture, tint=tint))
    return sorted(tinted, key=lambda picture: picture.number)


def _places(count: int, own: int, correlation: float) -> list[int]:
    """Backgrounds of a kind's birds: first those on their own one, then the others.

    The published train split has 3498 of 3682 and 1057 of 1113 at 95 %; rounding half up agrees.
    """
    on_own = int(count * correlation + 0.5)
    if 0 < correlation < 1:
        on_own = min(max(on_own, 1), count - 1)
    return [own] * on_own + [1 - own] * (count - on_own)


def draw_picture(picture: Picture, settings: RenderedWaterbirds) -> Image.Image:
    """Draw one picture, which does not depend on the others."""
    source = np.random.default_rng((settings.seed, picture.split, picture.number))
    large = settings.size * _OVERSAMPLING
    scene = draw_scene(picture.place, settings.size, source)
    backdrop = Image.fromarray(scene.astype(np.uint8)).resize((large, large))
    SPECIES[picture.species].draw(Pen(backdrop, source))
    drawn = backdrop.resize((settings.size, settings.size), Image.Resampling.BOX)
    return drawn if picture.tint is None else _in_light(drawn, picture, settings.seed)


def _in_light(drawn: Image.Image, picture: Picture, seed: int) -> Image.Image:
    """The picture in warm or cool light of some strength."""
    assert picture.tint is not None
    # A separate source, so that the rest is drawn as without a tint.
    source = np.random.default_rng((seed, picture.split, picture.number, 1))
    strength = source.uniform(_LEAST_TINT, 1)
    red, blue = (factor**strength for factor in _TINTS[picture.tint])
    pixels = np.asarray(drawn, dtype=np.float64) * (red, 1, blue)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def render_waterbirds(root: Path, settings: RenderedWaterbirds, progress: bool = True) -> None:
    """Draw the whole data set into ``root``, which is replaced.

    Args:
        root: folder to write, in the layout of ``waterbird_complete95_forest2water2``.
        settings: what to draw.
        progress: whether to show a progress bar.
    """
    pictures = plan_pictures(settings)
    with atomic_path(root, durable=False) as partial:
        for number, species in enumerate(SPECIES):
            (partial / f"{number + 1:03d}.{species.name}").mkdir(parents=True)
        for picture in track(pictures, "drawing birds") if progress else pictures:
            draw_picture(picture, settings).save(partial / picture.file)
        with (partial / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            second = () if settings.tint_correlation is None else ("tint",)
            writer.writerow((*_HEADER, *second))
            for p in pictures:
                tint = () if p.tint is None else (p.tint,)
                row = (p.number, p.file, p.kind, p.split, p.place, _SCENE_FILES[p.place])
                writer.writerow((*row, *tint))
