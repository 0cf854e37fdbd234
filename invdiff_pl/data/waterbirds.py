"""Waterbirds: birds of land and water on land and water, 95 % of each on its own."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.index import SPLITS, ImageIndex, index_images
from invdiff_pl.data.tables import check_codes, read_table
from invdiff_pl.utils.errors import InvDiffError

KINDS = ("landbird", "waterbird")


class WaterbirdsDataModule(BiasedDataModule):
    """Reads ``metadata.csv`` and the images of the published ``waterbird_complete95`` folder.

    The prompt names the bird, the hidden attribute is its background (``place``), which only
    evaluation reads.

    Args:
        prompt_by: what the prompt names: the ``species``, read from the image's folder
            ("001.Black_footed_Albatross" gives "a photo of a black footed albatross"), or the
            ``kind`` ("a photo of a landbird").
        **settings: as for :class:`BiasedDataModule`.
    """

    attribute = "background"
    attribute_names = ("land", "water")

    def __init__(
        self, *, prompt_by: Literal["species", "kind"] = "species", **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.prompt_by = prompt_by

    def read_index(self) -> ImageIndex:
        """Read files, prompts and splits; the column ``place`` is not read."""
        path = self.root / "metadata.csv"
        table = read_table(path, ["img_filename", "y", "split"])
        kinds = check_codes(table["y"], "y", len(KINDS), path)
        splits = check_codes(table["split"], "split", len(SPLITS), path)
        if self.prompt_by == "kind":
            prompts = [prompt_of(KINDS[kind]) for kind in kinds]
        else:
            prompts = [prompt_of(_species(name, path)) for name in table["img_filename"]]
        return index_images(self.root, table["img_filename"], prompts, splits, path)

    def read_attributes(self) -> Tensor | None:
        """Read the background of each image: 0 land, 1 water; ``None`` without such a column."""
        path = self.root / "metadata.csv"
        table = read_table(path, ["img_filename"], optional=["place"])
        if "place" not in table.columns:
            return None
        return torch.from_numpy(
            check_codes(table["place"], "place", len(self.attribute_names), path)
        )


def prompt_of(name: str) -> str:
    """Return the prompt of a bird's name: "a photo of a mallard", "a photo of an albatross"."""
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"a photo of {article} {name}"


def _species(filename: str, table: Path) -> str:
    folder = Path(filename).parent.name
    name = folder.split(".", 1)[-1].replace("_", " ").strip().lower()
    if not name:
        raise InvDiffError(
            f"{table} names {filename!r}, which lies in no species folder such as "
            "'001.Black_footed_Albatross/': use prompt_by=kind, or mend the row.",
            "prompt_by",
        )
    return name
