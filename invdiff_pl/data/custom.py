"""Users' own data sets: images with captions or prompts and, for scoring, an attribute."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.captions import Captions, Prompted, PromptRule, left_out_by_prompt, prompted
from invdiff_pl.data.index import ImageIndex, index_images, join_indices
from invdiff_pl.data.layouts import Listing, Reading, read_listings
from invdiff_pl.data.tables import encode, read_table
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file

# If 8 images are all alike, the share of others may still be 31 % (95 %), about the least
# difference between prompts that can be told from none.
LEAST_IMAGES = 8


class TableDataModule(BiasedDataModule):
    """Reads a folder of images with captions, in any common layout.

    The following are tried, in this order: ``table`` if it is given; ``metadata.EXT`` in the root,
    then in folders named after the splits (the layout of Hugging Face's imagefolder); any other
    table, if it is the only one there; and, without a table, a caption file beside each image, or
    the class that its folder is named after. Tables are CSV (with commas, semicolons, tabs or
    bars), TSV, JSON lines, JSON arrays or Parquet, with one row per image or, see ``captions``, per
    caption. File names are relative to the table's folder, the root, or a folder in either.

    Images of one prompt are compared with each other, so prompts must repeat. If captions do not,
    one of ``prompt``, ``prompt_map`` and ``prompts_from`` makes prompts from them.

    If neither a column nor a folder gives an image's split, a hash of its file name decides, so
    that the image keeps its split when others are added or removed.

    Args:
        table: path of the table, relative to ``root``; found as above if not given.
        file_column: column that names the image; the first column with a common name
            (``file_name``, ``image``, ``path``, …) if not given.
        prompt_column: column of the caption, which is the prompt unless the following say
            otherwise; the first column with a common name (``text``, ``caption``, ``prompt``, …) if
            not given.
        prompt: prompt of all images, if given; captions are not read.
        prompt_map: file, relative to ``root`` or the working directory, that gives the prompt of
            each caption: a JSON object, or a table whose first two columns are caption and prompt.
            Images with other captions are left out and counted.
        prompts_from: ``captions``, or ``words:nurse,doctor``: the one of the words that an image's
            caption holds, as a whole word in any case, makes its prompt. Images with none of them,
            or several, are left out and counted.
        prompt_template: template that makes a prompt from such a word, or from the name of a class
            folder, in the place of ``{}``.
        captions: what to do with an image with several rows: ``one`` rejects it, ``first`` takes
            the first, and ``all`` takes each; the image then belongs to each of their prompts.
        min_images_per_prompt: see :class:`BiasedDataModule`. With fewer than 8 images, even a
            prompt whose images are all alike cannot be told from one in which a third differ.
        split_column: column of the split (train, val or test; also 0, 1 or 2), if there is one.
        attribute_column: column of the attribute that goes along with the prompts; read for scoring
            only. Without one nothing is scored.
        attribute_names: the attribute's classes, in order; the column's distinct values, sorted,
            if not given.
        val_share: share, of the images split by hash, for training the scoring classifier.
        test_share: share, of the images split by hash, for testing it and for the Fréchet distance.
        **settings: as for :class:`BiasedDataModule`.
    """

    def __init__(
        self,
        *,
        table: str | None = None,
        file_column: str | None = None,
        prompt_column: str | None = None,
        prompt: str = "",
        prompt_map: str | None = None,
        prompts_from: str = "captions",
        prompt_template: str = "a photo of a {}",
        captions: Captions = "one",
        min_images_per_prompt: int = LEAST_IMAGES,
        split_column: str = "split",
        attribute_column: str | None = None,
        attribute_names: list[str] | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        **settings: Any,
    ) -> None:
        super().__init__(min_images_per_prompt=min_images_per_prompt, **settings)
        if not (val_share >= 0 and test_share >= 0 and val_share + test_share < 1):
            raise InvDiffError(
                f"val_share={val_share} and test_share={test_share}: expected shares from 0 that "
                "leave some for training.",
                "val_share",
                "test_share",
            )
        path = None if prompt_map is None else prompt_map_path(self.root, prompt_map)
        self.rule = PromptRule(prompt, path, prompts_from, prompt_template, captions)
        self.reading = Reading(
            table,
            file_column,
            prompt_column,
            split_column,
            prompt_template,
            captioned=not prompt,
            follow_links=self.follow_links,
        )
        self.attribute_column = attribute_column
        self.attribute = attribute_column or "attribute"
        self.given_names = attribute_names
        self.val_share = val_share
        self.test_share = test_share
        self._read: list[tuple[Listing, Prompted]] | None = None

    @property
    def attribute_names(self) -> Sequence[str]:
        """The attribute's classes; none without an attribute column."""
        if self.attribute_column is None:
            return ()
        if self.given_names is not None:
            return tuple(self.given_names)
        names = {str(n) for listing, _ in self._listed() for n in self._column(listing).unique()}
        if len(names) < 2:
            raise InvDiffError(
                f"{self._listed()[0][0].source}: every {self.attribute_column} is {min(names)!r}: "
                "an attribute has at least two classes; give `attribute_names` if the other just "
                "does not occur.",
                "attribute_names",
            )
        return tuple(sorted(names))

    @property
    def told(self) -> list[str]:
        """Messages for the user: what was read, from where, and what was left out."""
        listed = self._listed()
        found = [prompts for _, prompts in listed]
        out = left_out_by_prompt(found, self.rule, sum(len(prompts.rows) for prompts in found))
        return [*(listing.told for listing, _ in listed), *([] if out is None else [out])]

    def read_index(self) -> ImageIndex:
        """Read files, prompts and splits; the attribute column is not read."""
        parts = []
        for listing, found in self._listed():
            if not found.rows:
                continue
            files = listing.files.iloc[found.rows]
            nowhere = np.zeros(len(files), np.int64)
            index = index_images(
                listing.base,
                files,
                found.prompts,
                nowhere,
                listing.source,
                repeats=self.rule.captions == "all",
            )
            if listing.splits is None:
                splits = deal_splits(index.files, self.val_share, self.test_share)
            else:
                splits = listing.splits[found.rows]
            parts.append((listing.base, index, torch.from_numpy(splits)))
        return join_indices(self.root, parts)

    def read_attributes(self) -> Tensor | None:
        """Return the attribute class of each image; ``None`` without an attribute column."""
        if self.attribute_column is None:
            return None
        codes = {name: code for code, name in enumerate(self.attribute_names)}
        parts = [
            encode(
                self._column(listing).iloc[found.rows], self.attribute_column, codes, listing.source
            )
            for listing, found in self._listed()
        ]
        return torch.from_numpy(np.concatenate(parts))

    def _listed(self) -> list[tuple[Listing, Prompted]]:
        """Return what tables or folders list, and the prompts made from it; read once."""
        if self._read is None:
            read = [
                (listing, prompted(listing.files, listing.captions, self.rule, listing.source))
                for listing in read_listings(self.root, self.reading)
            ]
            if not any(found.rows for _, found in read):
                told = left_out_by_prompt([found for _, found in read], self.rule, 0)
                raise InvDiffError(f"{self.root} has no image of a prompt: {told}.")
            self._read = read
        return self._read

    def _column(self, listing: Listing) -> pd.Series:
        assert self.attribute_column is not None
        if not listing.has_table:
            raise InvDiffError(
                f"attribute_column={self.attribute_column}: {self.root} has no table, and "
                "so no such column.",
                "attribute_column",
            )
        return read_table(listing.source, [self.attribute_column])[self.attribute_column]


def prompt_map_path(root: Path, name: str) -> Path:
    """Return the path of a mapping of captions: in the data folder, else as the name says."""
    inside = root / name
    return inside if is_file(inside) else Path(name)


def deal_splits(files: Sequence[str], val_share: float, test_share: float) -> NDArray[np.int64]:
    """Return the split of each file, by a hash of its name alone.

    Args:
        files: relative paths.
        val_share: expected share of the val split.
        test_share: expected share of the test split.

    Returns:
        int64 ``[N]``, numbers of ``SPLITS``.
    """
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in files)
    uniform = np.frombuffer(digests, dtype="<u8") / 2.0**64
    val, test = uniform < val_share, uniform < val_share + test_share
    return np.where(val, 1, np.where(test, 2, 0)).astype(np.int64)
