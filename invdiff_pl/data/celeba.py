"""CelebA: hair colour and gender (Liu et al., ICCV 2015)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from invdiff_pl.data.index import SPLITS
from invdiff_pl.data.layouts.find import probe
from invdiff_pl.data.ratios import LabelledImages, RatioDataModule
from invdiff_pl.data.tables import check_codes, encode, read_table, refuse_repeated
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file

HAIR = ("Black_Hair", "Blond_Hair")
PROMPTS = ("a photo of a person with black hair", "a photo of a person with blond hair")
_CODES = {"-1": 0, "0": 0, "1": 1}
_ENDINGS = (".jpg", ".png", ".jpeg")


class CelebADataModule(RatioDataModule):
    """Reads CelebA as published, or in the CSV form that Kaggle distributes.

    The prompt names the hair colour, the hidden attribute is ``Male``. Images of neither colour,
    or of both, are left out. Groups of the ratio: black hair, female; black, male; blond, female;
    blond, male. So ``"1:4:4:1"`` makes black hair go along with men and blond hair with women.

    Pictures are cropped to their central square when they are read.

    Args:
        ratio: see :class:`RatioDataModule`.
        **settings: as for :class:`RatioDataModule`.
    """

    attribute = "gender"
    attribute_names = ("female", "male")

    def __init__(self, *, ratio: str = "1:4:4:1", **settings: Any) -> None:
        super().__init__(ratio=ratio, **settings)

    def label_files(self) -> list[Path]:
        """Return the attribute table and the partition table."""
        return [self._table("list_attr_celeba"), self._table("list_eval_partition")]

    def read_labelled(self) -> LabelledImages:
        """Read both tables, matched by file name."""
        attributes_file, partition_file = self.label_files()
        wanted = [*HAIR, "Male"]
        attributes = _read_attributes(attributes_file, wanted)
        partition = _read_partition(partition_file)
        refuse_repeated(attributes["file"], "file", attributes_file)
        refuse_repeated(partition["file"], "file", partition_file)
        values = {n: encode(attributes[n], n, _CODES, attributes_file) for n in wanted}
        codes = check_codes(partition["partition"], "partition", len(SPLITS), partition_file)
        of_file = pd.Series(codes, index=partition["file"])
        used = np.flatnonzero(values[HAIR[0]] != values[HAIR[1]])
        names = attributes["file"].to_numpy()[used]
        splits = of_file.reindex(names)
        if splits.isna().any():
            missing = splits.index[splits.isna().to_numpy().argmax()]
            raise InvDiffError(
                f"{partition_file} has no row for {missing}, which {attributes_file.name} lists: "
                "take both files from the same source."
            )
        return LabelledImages(
            files=self._paths(names),
            prompts=PROMPTS,
            prompt_ids=values[HAIR[1]][used],
            attributes=values["Male"][used],
            splits=splits.to_numpy(dtype=np.int64),
        )

    def _table(self, stem: str) -> Path:
        for folder in (self.root, self.root / "Anno", self.root / "Eval"):
            for ending in (".txt", ".csv"):
                if (path := folder / f"{stem}{ending}").is_file():
                    return path
        raise InvDiffError(
            f"{self.root} holds neither {stem}.txt nor {stem}.csv: DATA must be the CelebA folder, "
            "the one that holds these tables and img_align_celeba/."
        )

    def _paths(self, names: Any) -> Any:
        """Return the images' paths; the folder may be nested, and pictures may be PNG."""
        folders = (
            "img_align_celeba",
            "img_align_celeba/img_align_celeba",
            "img_align_celeba_png",
            "Img/img_align_celeba",
        )
        stems = pd.Series(names, dtype="str").str.rsplit(".", n=1).str[0]
        probed = probe(stems.tolist())
        own = Path(str(names[0])).suffix
        found = {}
        for folder in folders:
            for ending in dict.fromkeys((own, *_ENDINGS)):
                paths = [self.root / folder / f"{stem}{ending}" for stem in probed]
                found[folder, ending] = sum(is_file(path) for path in paths)
        folder, ending = max(found, key=lambda place: found[place])
        if found[folder, ending] > 0:
            return (folder + "/" + stems + ending).to_numpy()
        raise InvDiffError(
            f"{self.root} has no image {probed[0]}{own}, nor any of {len(probed) - 1} others "
            f"that were looked for, in {', '.join(folders)}: unpack img_align_celeba.zip there."
        )


def _read_attributes(path: Path, wanted: list[str]) -> pd.DataFrame:
    if path.suffix == ".csv":
        return read_table(path, ["image_id", *wanted]).rename(columns={"image_id": "file"})
    try:
        with path.open(encoding="utf-8-sig") as stream:
            stream.readline()
            names = stream.readline().split()
    except UnicodeDecodeError:
        names = []
    if missing := [name for name in wanted if name not in names]:
        raise InvDiffError(
            f"{path}, line 2 lacks the attribute {missing[0]!r}: expected the published file, "
            "whose second line names the forty attributes."
        )
    return read_table(
        path, ["file", *wanted], separator=r"\s+", names=["file", *names], skip_lines=2
    )


def _read_partition(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return read_table(path, ["image_id", "partition"]).rename(columns={"image_id": "file"})
    columns = ["file", "partition"]
    return read_table(path, columns, separator=r"\s+", names=columns)
