"""Cartoon faces in the file layout of FairFace (Kärkkäinen and Joo, WACV 2021)."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from invdiff_pl.data.synthetic.faces import draw_face
from invdiff_pl.data.synthetic.looks import FEMININE, MASCULINE, Face
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path
from invdiff_pl.utils.progress import track

# An arbitrary tone for each of the four groups of labels: the drawings need something that tells
# the groups apart, and make no claim about people.
_GROUPS = (
    (("White", "Latino_Hispanic", "Middle Eastern"), (240.0, 198.0, 172.0)),
    (("East Asian", "Southeast Asian"), (226.0, 182.0, 122.0)),
    (("Indian",), (168.0, 114.0, 74.0)),
    (("Black",), (96.0, 62.0, 46.0)),
)
_GENDERS = ("Female", "Male")
_AGES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
_HAIR = (45.0, 34.0, 30.0)
_QUALITY = 95


@dataclass(frozen=True)
class RenderedFairFace:
    """What to draw: a pool with equally many faces of each gender and group of race labels.

    Biased splits are drawn from the pool by ratio, as from the published data.

    Attributes:
        size: side of the pictures in pixels.
        train: number of faces of each (gender, group) in ``train/``.
        val: the same in ``val/``, from which the val and test splits are drawn.
        seed: the same seed gives the same bytes.

    Raises:
        InvDiffError: if a setting is out of range.
    """

    size: int = 64
    train: int = 1400
    val: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 32:
            raise InvDiffError(f"size={self.size}: pictures need at least 32 pixels.", "size")
        for name in ("train", "val"):
            if getattr(self, name) < 1:
                raise InvDiffError(f"{name}={getattr(self, name)}: expected at least 1.", name)
        if self.seed < 0:
            raise InvDiffError(f"seed={self.seed}: expected a whole number from 0 on.", "seed")


def render_fairface(root: Path, settings: RenderedFairFace, progress: bool = True) -> None:
    """Draw the pool into ``root``, which is replaced.

    Ages are drawn at random and do not show; ``service_test`` is ``False``.

    Args:
        root: folder to write: ``train/*.jpg``, ``val/*.jpg``, ``fairface_label_train.csv``,
            ``fairface_label_val.csv``.
        settings: what to draw.
        progress: whether to show a progress bar.
    """
    with atomic_path(root, durable=False) as partial:
        for split, name in enumerate(("train", "val")):
            (partial / name).mkdir(parents=True)
            _draw_split(partial, name, split, settings, progress)


def _draw_split(
    root: Path, name: str, split: int, settings: RenderedFairFace, progress: bool
) -> None:
    source = np.random.default_rng((settings.seed, 0, split))
    cells = [(style, group) for style in (FEMININE, MASCULINE) for group in range(len(_GROUPS))]
    order = source.permutation(np.repeat(np.arange(len(cells)), getattr(settings, name))).tolist()
    with (root / f"fairface_label_{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "age", "gender", "race", "service_test"))
        for number, cell in enumerate(
            track(order, f"drawing {name} faces") if progress else order, start=1
        ):
            style, group = cells[cell]
            own = np.random.default_rng((settings.seed, 1, split, number))
            races, skin = _GROUPS[group]
            file = f"{name}/{number}.jpg"
            picture = draw_face(Face(style, _HAIR, skin), settings.size, settings.size, 0.46, own)
            picture.save(root / file, quality=_QUALITY)
            age, race = own.choice(_AGES), own.choice(races)
            writer.writerow((file, age, _GENDERS[style], race, False))
