"""The images of a user's own data set, as its tables or folders list them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from invdiff_pl.data.layouts.columns import CAPTION_COLUMNS, FILE_COLUMNS, choose_column
from invdiff_pl.data.layouts.find import SPLIT_NAMES, base_of, find_tables
from invdiff_pl.data.layouts.folders import read_pictures
from invdiff_pl.data.table_formats import column_names
from invdiff_pl.data.tables import encode, read_table, reading


@dataclass(frozen=True)
class Reading:
    """How a folder is read; see :class:`~invdiff_pl.data.custom.TableDataModule`.

    Attributes:
        table: path of the table, relative to the root; searched for if not given.
        file_column: column that names the image; the first with a common name if not given.
        prompt_column: column of the caption; the first with a common name if not given.
        split_column: column of the split, if there is one.
        template: template that makes a caption from the name of a class folder.
        captioned: whether every image needs a caption.
        follow_links: look into linked folders, too.
    """

    table: str | None = None
    file_column: str | None = None
    prompt_column: str | None = None
    split_column: str = "split"
    template: str = "a photo of a {}"
    captioned: bool = True
    follow_links: bool = False


@dataclass(frozen=True)
class Listing:
    """Images as one table, or one folder without a table, lists them.

    Attributes:
        source: the table or folder, to be named in errors.
        base: folder that file names are relative to.
        files: text ``[N]``; the index is each row's number in the table.
        captions: text ``[N]``, empty if there are none.
        splits: int64 ``[N]``; ``None`` if nothing gives them.
        told: message on what was read from where.
    """

    source: Path
    base: Path
    files: pd.Series
    captions: pd.Series
    splits: NDArray[np.int64] | None
    told: str

    @property
    def has_table(self) -> bool:
        """Whether there is a table that may have other columns."""
        return not self.source.is_dir()


def read_listings(root: Path, settings: Reading) -> list[Listing]:
    """Read what a data set's tables or, if there are none, its folders list.

    Args:
        root: folder of the data set.
        settings: how the folder is read.

    Raises:
        InvDiffError: if nothing is found, a table cannot be read or lacks a column, or an image
            has no caption.
    """
    if tables := find_tables(root, settings.table):
        return [_of_table(path, split, root, settings) for path, split in tables]
    return [_of_folders(root, settings)]


def _of_table(path: Path, split: int | None, root: Path, settings: Reading) -> Listing:
    with reading(path):
        columns = column_names(path)
    if not columns:
        read_table(path, [settings.file_column or FILE_COLUMNS[0]])  # tells what is wrong with it
    file_column = choose_column(path, columns, settings.file_column, FILE_COLUMNS, "file_column")
    wanted = [file_column]
    if settings.captioned:
        wanted.append(
            choose_column(path, columns, settings.prompt_column, CAPTION_COLUMNS, "prompt_column")
        )
    optional = [] if settings.split_column in wanted else [settings.split_column]
    rows = read_table(path, wanted, optional=optional)
    files = rows[file_column]
    splits = None
    if split is not None:
        splits = np.full(len(rows), split)
    elif settings.split_column in rows and optional:
        values = rows[settings.split_column].str.lower()
        splits = encode(values, settings.split_column, SPLIT_NAMES, path)
    base = base_of(files.tolist(), path, root)
    captions = rows[wanted[1]] if settings.captioned else pd.Series("", index=files.index)
    told = f"{path.name}: images by the column {file_column!r}"
    told += f", captions by {wanted[1]!r}" if settings.captioned else ""
    if base != path.parent:
        told += f"; the images lie in {base}"
    return Listing(path, base, files, captions, splits, told)


def _of_folders(root: Path, settings: Reading) -> Listing:
    found = read_pictures(
        root,
        settings.template,
        follow_links=settings.follow_links,
        captioned=settings.captioned,
    )
    rows = range(1, len(found.names) + 1)
    told = f"{root} holds no table: captions come from {found.told_by}"
    if not settings.captioned:
        told = f"{root} holds no table: every image in it is listed"
    return Listing(
        source=root,
        base=root,
        files=pd.Series(found.names, index=rows, dtype="str"),
        captions=pd.Series(found.captions, index=rows, dtype="str"),
        splits=None if found.splits is None else np.array(found.splits, dtype=np.int64),
        told=told,
    )
