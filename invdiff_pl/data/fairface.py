"""FairFace: gender and race in four groups (Kärkkäinen and Joo, WACV 2021)."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from invdiff_pl.data.index import SPLITS
from invdiff_pl.data.layouts.find import probe
from invdiff_pl.data.ratios import LabelledImages, RatioDataModule
from invdiff_pl.data.tables import encode, read_table, refuse_repeated
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file

PROMPTS = ("a photo of a man", "a photo of a woman")
_GENDERS = {"Male": 0, "Female": 1}
# The four groups into which the reference merges the seven labels.
_RACES = {
    "White": 0,
    "Latino_Hispanic": 0,
    "Middle Eastern": 0,
    "East Asian": 1,
    "Southeast Asian": 1,
    "Indian": 2,
    "Black": 3,
}
_FOLDERS = (".", "fairface-img-margin025-trainval", "fairface-img-margin125-trainval")
VAL_SHARE = 1 / 3  # of fairface_label_val.csv; the others are the test split


class FairFaceDataModule(RatioDataModule):
    """Reads FairFace as published, with either margin.

    The prompt names the gender, the hidden attribute is the race label in four groups: White,
    Latino_Hispanic and Middle Eastern; East and Southeast Asian; Indian; Black. Groups of the
    ratio: these four for men, then for women. The published data has no test split, so the images
    of ``fairface_label_val.csv`` are split into val and test by a hash of their names.

    Args:
        ratio: see :class:`RatioDataModule`.
        **settings: as for :class:`RatioDataModule`.
    """

    attribute = "race"
    attribute_names = ("white/latino/middle eastern", "asian", "indian", "black")

    def __init__(self, *, ratio: str = "3:2:1:1:1:1:2:3", **settings: Any) -> None:
        super().__init__(ratio=ratio, **settings)

    def label_files(self) -> list[Path]:
        """Return the tables of the published train and val splits."""
        files = []
        for name in ("fairface_label_train.csv", "fairface_label_val.csv"):
            found = [p for f in _FOLDERS if (p := self.root / f / name).is_file()]
            if not found:
                raise InvDiffError(
                    f"{self.root} lacks {name}: DATA must be the FairFace folder, the one that "
                    "holds both label tables and the folders train/ and val/ (or "
                    f"{_FOLDERS[1]}/ with these)."
                )
            files.append(found[0])
        return files

    def read_labelled(self) -> LabelledImages:
        """Read both tables."""
        tables, genders, races = [], [], []
        for path in self.label_files():
            table = read_table(path, ["file", "gender", "race"])
            refuse_repeated(table["file"], "file", path)
            genders.append(encode(table["gender"], "gender", _GENDERS, path))
            races.append(encode(table["race"], "race", _RACES, path))
            tables.append(table["file"])
        train, val = tables
        splits = np.zeros(len(train) + len(val), dtype=np.int64)
        splits[len(train) :] = _deal(val)
        names = pd.concat(tables)
        return LabelledImages(
            files=(self._prefix(names.tolist()) + names).to_numpy(),
            prompts=PROMPTS,
            prompt_ids=np.concatenate(genders),
            attributes=np.concatenate(races),
            splits=splits,
        )

    def _prefix(self, names: list[str]) -> str:
        probed = probe(names)
        hits = {f: sum(is_file(self.root / f / name) for name in probed) for f in _FOLDERS}
        folder = max(hits, key=lambda each: hits[each])
        if hits[folder] > 0:
            return "" if folder == "." else f"{folder}/"
        raise InvDiffError(
            f"{self.root} has no image {names[0]}, which fairface_label_train.csv lists, nor has "
            f"{_FOLDERS[1]}/ or {_FOLDERS[2]}/: unpack the images there."
        )


def _deal(names: pd.Series) -> Any:
    """Choose val or test for each name by its hash, so that it does not depend on the others."""
    shares = np.array(
        [hashlib.blake2b(name.encode(), digest_size=4).digest() for name in names]
    ).view(">u4") / float(1 << 32)
    return np.where(shares < VAL_SHARE, SPLITS.index("val"), SPLITS.index("test"))
