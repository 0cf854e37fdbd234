"""Data sets of one's own: a table of images, prompts and, for scoring, an attribute."""

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
from invdiff_pl.data.index import SPLITS, ImageIndex, index_images, join_indices
from invdiff_pl.data.tables import SUFFIXES, encode, read_table
from invdiff_pl.utils.errors import InvDiffError

# How tables and folders call the splits.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "0"), 0),
    **dict.fromkeys(("val", "valid", "validation", "dev", "1"), 1),
    **dict.fromkeys(("test", "testing", "2"), 2),
}
_TABLE = "metadata"


class TableDataModule(BiasedDataModule):
    """Reads any folder of images that comes with a table.

    The table is a CSV, TSV, JSON-lines or Parquet file with one row an image. File names are
    relative to the table's folder. Read are, in this order: ``table`` if it is given;
    ``metadata.EXT`` in the root; ``metadata.EXT`` in folders named after the splits, the layout of
    Hugging Face's imagefolder.

    Where neither a column nor a folder tells an image's split, a hash of its file name deals it,
    so that it stays where it is when others come or go.

    Args:
        table: path of the table, relative to ``root``.
        file_column: names the image.
        prompt_column: its prompt.
        split_column: its split (train, val or test; also 0, 1 or 2), if there is such a column.
        attribute_column: the attribute that goes along with the prompts; read for scoring only.
            Without one nothing is scored.
        attribute_names: the attribute's classes, in order; the column's distinct values, sorted,
            if not given.
        val_share: of the images that are dealt, those for training the scoring classifier.
        test_share: of the images that are dealt, those for testing it and for the Fréchet distance.
        **settings: of :class:`BiasedDataModule`.
    """

    def __init__(
        self,
        *,
        table: str | None = None,
        file_column: str = "file_name",
        prompt_column: str = "text",
        split_column: str = "split",
        attribute_column: str | None = None,
        attribute_names: list[str] | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not (val_share >= 0 and test_share >= 0 and val_share + test_share < 1):
            raise InvDiffError(
                f"--data.val_share={val_share} and --data.test_share={test_share}: expected shares "
                "from 0 that leave some for training."
            )
        self.table = table
        self.file_column = file_column
        self.prompt_column = prompt_column
        self.split_column = split_column
        self.attribute_column = attribute_column
        self.attribute = attribute_column or "attribute"
        self.given_names = attribute_names
        self.val_share = val_share
        self.test_share = test_share

    @property
    def attribute_names(self) -> Sequence[str]:
        """The attribute's classes; none without an attribute column."""
        if self.attribute_column is None:
            return ()
        if self.given_names is not None:
            return tuple(self.given_names)
        column = self.attribute_column
        names = {str(name) for path in self._tables() for name in _column(path, column).unique()}
        if len(names) < 2:
            raise InvDiffError(
                f"{self._tables()[0]}: every {column} is {min(names)!r}: an attribute has at least "
                "two classes; give --data.attribute_names if the other just does not occur."
            )
        return tuple(sorted(names))

    def read_index(self) -> ImageIndex:
        """Read files, prompts and splits; the attribute column is not looked at."""
        tables = self._tables()
        folders_tell = self.table is None and tables[0].parent != self.root and len(tables) > 1
        parts = []
        for path in tables:
            columns = [self.file_column, self.prompt_column]
            rows = read_table(path, columns, optional=[self.split_column])
            files, prompts = rows[self.file_column], rows[self.prompt_column]
            index = index_images(path.parent, files, prompts, np.zeros(len(rows), np.int64), path)
            if folders_tell:
                splits = np.full(len(rows), SPLIT_NAMES[path.parent.name.lower()])
            elif self.split_column in rows:
                values = rows[self.split_column].str.lower()
                splits = encode(values, self.split_column, SPLIT_NAMES, path)
            else:
                splits = deal_splits(index.files, self.val_share, self.test_share)
            parts.append((path.parent, index, torch.from_numpy(splits)))
        return join_indices(self.root, parts)

    def read_attributes(self) -> Tensor | None:
        """Attribute class of each image; ``None`` without an attribute column."""
        if self.attribute_column is None:
            return None
        codes = {name: code for code, name in enumerate(self.attribute_names)}
        column = self.attribute_column
        parts = [encode(_column(path, column), column, codes, path) for path in self._tables()]
        return torch.from_numpy(np.concatenate(parts))

    def _tables(self) -> list[Path]:
        """The table, or those of the split folders in the order of the splits."""
        if self.table is not None:
            return [self.root / self.table]
        if (path := _metadata(self.root)) is not None:
            return [path]
        found: dict[int, Path] = {}
        for folder in sorted(path for path in self.root.iterdir() if path.is_dir()):
            split = SPLIT_NAMES.get(folder.name.lower())
            path = None if split is None else _metadata(folder)
            if split is None or path is None:
                continue
            if split in found:
                raise InvDiffError(
                    f"{found[split].parent} and {folder} both hold the {SPLITS[split]} split: "
                    "remove one."
                )
            found[split] = path
        if not found:
            endings = ", ".join(SUFFIXES)
            raise InvDiffError(
                f"{self.root} holds no {_TABLE}.EXT (EXT one of {endings}), nor do folders train, "
                "val and test in it: name the table with --data.table=."
            )
        return [found[split] for split in sorted(found)]


def _metadata(folder: Path) -> Path | None:
    found = [folder / f"{_TABLE}{suffix}" for suffix in SUFFIXES]
    found = [path for path in found if path.is_file()]
    if len(found) > 1:
        raise InvDiffError(
            f"{folder} holds both {found[0].name} and {found[1].name}: name the one to read with "
            "--data.table=, or remove the other."
        )
    return found[0] if found else None


def _column(path: Path, column: str) -> pd.Series:
    return read_table(path, [column])[column]


def deal_splits(files: Sequence[str], val_share: float, test_share: float) -> NDArray[np.int64]:
    """Split of each file, by a hash of its name alone.

    Args:
        files: relative paths.
        val_share: expected share of the val split.
        test_share: expected share of the test split.

    Returns:
        int64 ``[N]`` into ``SPLITS``.
    """
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in files)
    uniform = np.frombuffer(digests, dtype="<u8") / 2.0**64
    val, test = uniform < val_share, uniform < val_share + test_share
    return np.where(val, 1, np.where(test, 2, 0)).astype(np.int64)
