"""Cartoon faces in the file layout of CelebA (Liu et al., ICCV 2015)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from invdiff_pl.data.synthetic.faces import draw_face
from invdiff_pl.data.synthetic.looks import FEMININE, MASCULINE, Face
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path
from invdiff_pl.utils.progress import track

# The forty names of list_attr_celeba.txt, in their order.
_NAMES = """
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair
Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face
Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair
Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
"""
ATTRIBUTES = tuple(_NAMES.split())
_HAIR = {"Black_Hair": (38.0, 30.0, 30.0), "Blond_Hair": (222.0, 186.0, 98.0)}
_LIGHTEST, _DARKEST = np.array([242.0, 202.0, 176.0]), np.array([160.0, 106.0, 68.0])
_QUALITY = 95


@dataclass(frozen=True)
class RenderedCelebA:
    """What to draw: a pool with equally many faces of each hair colour and gender.

    Biased splits are drawn from the pool by ratio, as from the published data.

    Attributes:
        width: width of the pictures in pixels; their proportions are the published ones (178 by
            218).
        train: number of faces of each (hair colour, gender) in the train split.
        val: the same in val.
        test: the same in test.
        seed: the same seed gives the same bytes.

    Raises:
        InvDiffError: if a setting is out of range.
    """

    width: int = 89
    train: int = 2200
    val: int = 250
    test: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 32:
            raise InvDiffError(f"width={self.width}: pictures need at least 32 pixels.", "width")
        for name in ("train", "val", "test"):
            if getattr(self, name) < 1:
                raise InvDiffError(f"{name}={getattr(self, name)}: expected at least 1.", name)
        if self.seed < 0:
            raise InvDiffError(f"seed={self.seed}: expected a whole number from 0 on.", "seed")


def render_celeba(root: Path, settings: RenderedCelebA, progress: bool = True) -> None:
    """Draw the pool into ``root``, which is replaced.

    Only ``Male``, ``Black_Hair``, ``Blond_Hair`` and ``Brown_Hair`` are true of the drawings; all
    other attributes are -1.

    Args:
        root: folder to write: ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt``,
            ``list_eval_partition.txt``.
        settings: what to draw.
        progress: whether to show a progress bar.
    """
    source = np.random.default_rng((settings.seed, 0))
    cells = [(hair, style) for hair in _HAIR for style in (FEMININE, MASCULINE)]
    rows = [
        (split, cell)
        for split, count in enumerate((settings.train, settings.val, settings.test))
        for cell in source.permutation(np.repeat(np.arange(len(cells)), count)).tolist()
    ]
    height = round(settings.width * 218 / 178)
    attributes, partition = [], []
    with atomic_path(root, durable=False) as partial:
        folder = partial / "img_align_celeba"
        folder.mkdir(parents=True)
        for number, (split, cell) in enumerate(
            track(rows, "drawing faces") if progress else rows, start=1
        ):
            hair, style = cells[cell]
            own = np.random.default_rng((settings.seed, 1, number))
            skin = _LIGHTEST + (_DARKEST - _LIGHTEST) * own.uniform()
            face = Face(style, _HAIR[hair], tuple(skin.tolist()), cues=True)
            name = f"{number:06d}.jpg"
            picture = draw_face(face, settings.width, height, 0.52, own, size=0.85)
            picture.save(folder / name, quality=_QUALITY)
            true = {hair} | ({"Male"} if style == MASCULINE else set())
            attributes.append(f"{name} {' '.join('1' if a in true else '-1' for a in ATTRIBUTES)}")
            partition.append(f"{name} {split}")
        header = [str(len(rows)), " ".join(ATTRIBUTES)]
        for file, lines in (
            ("list_attr_celeba.txt", header + attributes),
            ("list_eval_partition.txt", partition),
        ):
            (partial / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
