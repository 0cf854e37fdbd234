"""Index of a data set: image files, the prompt of each and the split it belongs to."""

import hashlib
import os
import posixpath
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISLNK

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff_pl.data.tables import place, refuse
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file, digest_json, read_object, write_json
from invdiff_pl.utils.threads import map_in_threads

SPLITS = ("train", "val", "test")
# Upwards, absolute, a Windows drive, a Windows separator, or no file name at all.
_OUTSIDE = r"(?:^|/)\.\.(?:/|$)|^/|^[A-Za-z]:|\\|\x00"
_UNTIDY = r"(?:^|/)\.?(?:/|$)"


@dataclass(frozen=True)
class ImageIndex:
    """The images of a data set, without any attribute.

    Attributes:
        root: folder that the files are relative to.
        files: relative path of each image.
        prompts: the distinct prompts.
        prompt_ids: int64 ``[N]``, numbers of ``prompts``.
        splits: int64 ``[N]``, numbers of ``SPLITS``.
    """

    root: Path
    files: tuple[str, ...]
    prompts: tuple[str, ...]
    prompt_ids: Tensor
    splits: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, split: str) -> Tensor:
        """Return the row numbers of a split, int64, ascending.

        Raises:
            InvDiffError: if the split has no image.
        """
        rows = (self.splits == SPLITS.index(split)).nonzero().squeeze(1)
        if len(rows) == 0:
            raise InvDiffError(
                f"{self.root} has no image in its {split} split: mark some images of its table as "
                f"{split}."
            )
        return rows

    def subset(self, rows: Tensor) -> "ImageIndex":
        """Return the index of some of the images; all prompts are kept."""
        files = tuple(self.files[row] for row in rows.tolist())
        return replace(
            self, files=files, prompt_ids=self.prompt_ids[rows], splits=self.splits[rows]
        )

    def of_prompts(self, kept: Tensor) -> tuple["ImageIndex", Tensor]:
        """Return the index of the images of some prompts, and their rows.

        Args:
            kept: which prompts to keep, bool ``[P]``.
        """
        rows = kept[self.prompt_ids].nonzero().squeeze(1)
        numbers = kept.cumsum(0) - 1
        index = self.subset(rows)
        prompts = tuple(p for p, keep in zip(self.prompts, kept.tolist(), strict=True) if keep)
        return replace(index, prompts=prompts, prompt_ids=numbers[index.prompt_ids]), rows

    def require_training_images(self) -> None:
        """Check that every prompt has images to train on.

        Raises:
            InvDiffError: if the train split has no image, or some prompt has none in it.
        """
        prompts = self.prompt_ids[self.rows("train")]
        counts = prompts.bincount(minlength=len(self.prompts))
        absent = (counts == 0).nonzero().squeeze(1).tolist()
        if absent:
            more = f" (nor of {len(absent) - 1} other prompts)" if len(absent) > 1 else ""
            raise InvDiffError(
                f"{self.root} has no image of the prompt {self.prompts[absent[0]]!r} in its train "
                f"split{more}: every prompt needs some to infer environments from; add images, or "
                "remove the prompt's rows."
            )

    def paths(self, rows: Tensor) -> list[Path]:
        """Return the paths of rows, below ``root``."""
        return [self.root / self.files[row] for row in rows.tolist()]


def index_images(
    root: Path,
    files: Sequence[str] | pd.Series,
    prompts: Sequence[str] | pd.Series,
    splits: Sequence[int] | NDArray[np.int64],
    table: Path,
    *,
    repeats: bool = False,
) -> ImageIndex:
    """Build an index from one prompt and one split per row.

    Args:
        root: folder of the data set.
        files: paths relative to ``root``, with forward slashes; a column of ``read_table``, or a
            plain sequence in the order of the rows below the table's header.
        prompts: prompt of each file.
        splits: split of each file, as a number of ``SPLITS``.
        table: table that they come from, to be named in errors.
        repeats: whether a file may have several rows, each with a different prompt.

    Raises:
        InvDiffError: if there is no file, one is named twice, or one lies outside the root.
    """
    if len(files) == 0:
        raise InvDiffError(f"{table} lists no image.")
    index = files.index if isinstance(files, pd.Series) else range(2, len(files) + 2)
    names = pd.Series(files, index=index, dtype="str")
    refuse(
        names.str.contains(_OUTSIDE, regex=True),
        names,
        str(names.name or "the file"),
        f"a path with forward slashes inside {root}, none that lies outside",
        table,
    )
    odd = names.str.contains(_UNTIDY, regex=True)
    if odd.any():
        names[odd] = names[odd].map(posixpath.normpath)
    if not repeats:
        _refuse_duplicates(names, table)
    codes, found = pd.factorize(pd.Series(prompts, dtype="str"))
    distinct = sorted(found)
    number = {prompt: position for position, prompt in enumerate(distinct)}
    in_order = np.array([number[prompt] for prompt in found], dtype=np.int64)
    return ImageIndex(
        root=root,
        files=tuple(names),
        prompts=tuple(distinct),
        prompt_ids=torch.from_numpy(in_order[codes]),
        splits=torch.tensor(np.asarray(splits), dtype=torch.int64),
    )


def join_indices(root: Path, parts: Sequence[tuple[Path, ImageIndex, Tensor]]) -> ImageIndex:
    """Join the indices of several tables.

    Args:
        root: folder that holds all of them.
        parts: folder, index and splits of each; prompts may differ.
    """
    prompts = sorted({prompt for _, index, _ in parts for prompt in index.prompts})
    number = {prompt: position for position, prompt in enumerate(prompts)}
    files: list[str] = []
    prompt_ids = []
    for folder, index, _ in parts:
        prefix = folder.relative_to(root).as_posix()
        files += index.files if prefix == "." else [f"{prefix}/{name}" for name in index.files]
        prompt_ids.append(torch.tensor([number[p] for p in index.prompts])[index.prompt_ids])
    splits = torch.cat([splits for _, _, splits in parts])
    return ImageIndex(root, tuple(files), tuple(prompts), torch.cat(prompt_ids), splits)


def _refuse_duplicates(names: pd.Series, table: Path) -> None:
    """Reject an image that is listed twice: it would count twice, and could be in two splits."""
    again = names.duplicated().to_numpy()
    if not again.any():
        return
    second = int(again.argmax())
    name = names.iloc[second]
    first = int((names == name).to_numpy().argmax())
    places = [place(table, names.index[row]) for row in (first, second)]
    more = f" ({int(again.sum()) - 1} other rows also repeat a file)" if again.sum() > 1 else ""
    raise InvDiffError(
        f"{table}, {places[0]} and {places[1]} both name {name!r}{more}: remove one of the rows."
    )


def content_digest(
    root: Path, files: Sequence[str], memo_folder: Path, *, follow_links: bool = False
) -> str:
    """Compute the digest of the contents of files below a root.

    Reading gigabytes at every start would be slow, so the digest is remembered for as long as
    every file keeps its size and modification time.

    Raises:
        InvDiffError: if a file is missing, or is a link to something outside the root that is not
            to be followed.
    """
    memo = memo_folder / f"{state_digest(root, files, follow_links=follow_links)}.json"
    with suppress(InvDiffError):  # no memo, or a damaged one
        return str(read_object(memo, content=str)["content"])
    content = digest_json(list(map_in_threads(lambda name: digest_file(root / name), files)))
    write_json(memo, {"content": content, "files": len(files)})
    return content


def state_digest(
    root: Path, files: Sequence[str], *, missing_ok: bool = False, follow_links: bool = False
) -> str:
    """Compute the digest of the names, sizes and modification times of files below a root.

    Args:
        root: the folder.
        files: relative paths.
        missing_ok: count a file that cannot be reached as unreachable, rather than raise.
        follow_links: follow links that lead outside the root.

    Raises:
        InvDiffError: if a file is missing, or is a link to something outside the root that is not
            to be followed.
    """
    inside = InsideRoot(root, follow_links=follow_links)
    hasher = hashlib.blake2b(digest_size=16)
    for name in files:
        try:
            stat = inside.stat(name)
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except (InvDiffError, OSError) as error:
            if missing_ok:
                state = "unreachable"
            elif isinstance(error, InvDiffError):
                raise
            else:
                raise InvDiffError(
                    f"image {root / name} is listed in the data set's table but missing: restore "
                    "the file, remove its row, or leave such images out with broken=skip.",
                    "broken",
                ) from None
        hasher.update(f"{root / name}\0{state}\0".encode())
    return hasher.hexdigest()


class InsideRoot:
    """Rejects files that a symbolic link puts outside the root.

    A folder is resolved once, so that a million files cost a million calls of ``lstat`` and no
    more.

    Args:
        root: the folder.
        follow_links: reject nothing.
    """

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self.follow_links = follow_links
        self.root = str(root)
        self._real_root = os.path.realpath(root)
        self._folders: dict[str, bool] = {}

    def stat(self, name: str) -> os.stat_result:
        """Return the state of the file at a relative path.

        Raises:
            InvDiffError: if a link leads outside the root.
            OSError: if there is no such file.
        """
        path = os.path.join(self.root, name)
        if self.follow_links:
            return os.stat(path)
        folder = os.path.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = self._holds(folder)
        stat = os.lstat(path)
        linked = S_ISLNK(stat.st_mode)
        if not self._folders[folder] or (linked and not self._holds(path)):
            raise InvDiffError(
                f"image {path} is a link to {os.path.realpath(path)}, outside the data folder, "
                "where nothing is read: read it with links=follow, or put the file itself "
                "there.",
                "links",
            )
        return os.stat(path) if linked else stat

    def _holds(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real_root or real.startswith(os.path.join(self._real_root, ""))
