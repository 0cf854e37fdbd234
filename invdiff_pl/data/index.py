"""What a data set holds: image files, the prompt of each and the split it belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import digest_file, digest_json, read_json, write_json

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageIndex:
    """The images of a data set, without any attribute.

    Attributes:
        root: folder that the files are relative to.
        files: relative path of each image.
        prompts: the distinct prompts.
        prompt_ids: int64 ``[N]`` into ``prompts``.
        splits: int64 ``[N]`` into ``SPLITS``.
    """

    root: Path
    files: tuple[str, ...]
    prompts: tuple[str, ...]
    prompt_ids: Tensor
    splits: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, split: str) -> Tensor:
        """Row numbers of a split, int64, ascending.

        Raises:
            InvDiffError: if the split has no image.
        """
        rows = (self.splits == SPLITS.index(split)).nonzero().squeeze(1)
        if len(rows) == 0:
            raise InvDiffError(f"{self.root} has no image in its {split} split.")
        return rows

    def paths(self, rows: Tensor) -> list[Path]:
        """Absolute paths of rows."""
        return [self.root / self.files[row] for row in rows.tolist()]


def index_images(
    root: Path, files: Sequence[str], prompts: Sequence[str], splits: Sequence[int], table: Path
) -> ImageIndex:
    """Build an index from one prompt and one split a file.

    Raises:
        InvDiffError: if a file lies outside the root, or the table is empty.
    """
    if not files:
        raise InvDiffError(f"{table} lists no image.")
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise InvDiffError(
            f"{table} names {outside[0]!r}, which lies outside {root}: mend the row."
        )
    distinct = sorted(set(prompts))
    number = {prompt: position for position, prompt in enumerate(distinct)}
    return ImageIndex(
        root=root,
        files=tuple(files),
        prompts=tuple(distinct),
        prompt_ids=torch.tensor([number[prompt] for prompt in prompts]),
        splits=torch.tensor(splits),
    )


def content_digest(paths: Sequence[Path], memo_folder: Path) -> str:
    """Digest of the files' contents.

    Reading gigabytes at every start would be slow, so the digest is remembered for as long as
    every file keeps its size and modification time.

    Raises:
        InvDiffError: if a file is missing.
    """
    try:
        stats = [(str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in paths]
    except FileNotFoundError as error:
        raise InvDiffError(
            f"image {error.filename} is listed in the data set's table but missing: restore the "
            "file or remove its row."
        ) from None
    memo = memo_folder / f"{digest_json(stats)}.json"
    if memo.is_file():
        return str(read_json(memo)["content"])
    content = digest_json([digest_file(path) for path in paths])
    write_json(memo, {"content": content, "files": len(paths)})
    return content
