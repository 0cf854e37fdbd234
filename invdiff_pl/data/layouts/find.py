"""Finding the tables of a folder, and the folder that a table's file names are relative to."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from invdiff_pl.data.index import SPLITS
from invdiff_pl.data.table_formats import SUFFIXES
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file

# Names of the splits in tables and folders.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "0"), 0),
    **dict.fromkeys(("val", "valid", "validation", "dev", "1"), 1),
    **dict.fromkeys(("test", "testing", "2"), 2),
}
TABLE = "metadata"
# Text and JSON files may hold anything, so only those with these names are taken for tables.
_STEMS = (TABLE, "captions", "annotations", "prompts")
_ONLY_BY_STEM = (".json", ".txt")
_PROBED = 64

Found = tuple[Path, int | None]  # a table, and the split given by its folder or its name


def find_tables(root: Path, given: str | None) -> list[Found]:
    """Find the tables of a data set, in the order of the splits, if there are any.

    The following are tried, in this order: the given table; ``metadata.EXT`` in the root, then in
    folders named after the splits; tables named after the splits; the only other table in the root,
    then in those folders.

    Args:
        root: folder of the data set.
        given: path of the table, relative to the root.

    Raises:
        InvDiffError: if there are several tables, and it is unclear which one to read.
    """
    if given is not None:
        return [(root / given, None)]
    if (path := _metadata(root)) is not None:
        return [(path, None)]
    folders = _split_folders(root)
    if found := _in_folders(folders, {split: _metadata(at) for split, at in folders.items()}):
        return found
    others = _other_tables(root)
    by_split = {SPLIT_NAMES.get(path.stem.lower(), -1): path for path in others}
    if others and len(by_split) == len(others) and -1 not in by_split:
        return [(by_split[split], split) for split in sorted(by_split)]
    if (path := _only(root, others)) is not None:
        return [(path, None)]
    tables = {split: _only(at, _other_tables(at)) for split, at in folders.items()}
    return _in_folders(folders, tables)


def base_of(names: Sequence[str], table: Path, root: Path) -> Path:
    """Find the folder that a table's file names are relative to.

    It is the table's own folder, the root, or a folder in either: the first in which most of the
    probed names are files, or the table's own folder if none of them is a file anywhere.

    Args:
        names: all file names in the table.
        table: path of the table.
        root: folder of the data set, which holds the result.
    """
    probed = probe(names)
    own = table.parent if table.parent.is_relative_to(root) else root
    best, most = own, 0
    for parent in dict.fromkeys((own, root)):
        for folder in (parent, *_folders_in(parent)):
            hits = sum(is_file(folder / name) for name in probed)
            if hits > most:
                best, most = folder, hits
            if hits == len(probed):
                return best
    return best


def probe(names: Sequence[str]) -> list[str]:
    """Choose some of the names, evenly spaced, to find their folder even if some are missing."""
    places = np.linspace(0, len(names) - 1, min(_PROBED, len(names))).astype(int)
    return [names[place] for place in places]


def _metadata(folder: Path) -> Path | None:
    found = [folder / f"{TABLE}{suffix}" for suffix in SUFFIXES]
    found = [path for path in found if path.is_file()]
    if len(found) > 1:
        raise InvDiffError(
            f"{folder} holds both {found[0].name} and {found[1].name}: name the one to read with "
            "table=, or remove the other.",
            "table",
        )
    return found[0] if found else None


def _other_tables(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (*SUFFIXES, ".txt")
        and (path.suffix.lower() not in _ONLY_BY_STEM or path.stem.lower() in _STEMS)
        and not path.name.startswith(".")
        and path.is_file()
    ]


def _only(folder: Path, tables: list[Path]) -> Path | None:
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables[:5]) + (", …" if len(tables) > 5 else "")
        raise InvDiffError(
            f"{folder} holds several tables ({names}): name the one to read with table=.",
            "table",
        )
    return tables[0] if tables else None


def _split_folders(root: Path) -> dict[int, Path]:
    """Find the folders named after the splits; of two for one split, only one may hold a table."""
    found: dict[int, Path] = {}
    for folder in _folders_in(root):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split is None:
            continue
        if split in found:
            if _metadata(found[split]) is None:
                found[split] = folder
            elif _metadata(folder) is not None:
                raise InvDiffError(
                    f"{found[split]} and {folder} both hold the {SPLITS[split]} split: remove one."
                )
        else:
            found[split] = folder
    return found


def _in_folders(folders: dict[int, Path], tables: dict[int, Path | None]) -> list[Found]:
    found: list[Found] = [
        (path, split) for split in sorted(folders) if (path := tables[split]) is not None
    ]
    # A single folder, such as train, says nothing about the other splits.
    if len(found) == 1:
        return [(found[0][0], None)]
    return found


def _folders_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
