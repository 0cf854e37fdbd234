"""Folders without a table: a caption file beside each picture, or a folder for each class."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from invdiff_pl.data.layouts.find import SPLIT_NAMES
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import walk

IMAGES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".avif"),
)
CAPTIONS = (".txt", ".caption")
# Folders with these names may hold pictures of anything.
_OF_ANYTHING = ("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "data")
# Where the cache of the Hugging Face hub holds the files of a data set.
_SNAPSHOTS = ("snapshots/*/", "datasets--*/snapshots/*/", "hub/datasets--*/snapshots/*/")
# kohya's trainers repeat a folder's images as often as its name says, as in 10_dog; the classes of
# Caltech-UCSD Birds are numbered, as in 001.Black_footed_Albatross.
_NUMBERED = re.compile(r"\d+(?:_|\.(?=\D))(.+)")


@dataclass(frozen=True)
class Pictures:
    """The image files below a folder.

    Attributes:
        names: relative paths, sorted.
        captions: caption of each, from the file beside it or from its folder's name; empty if
            neither gives one.
        splits: split of each by its topmost folder; ``None`` unless folders of several splits hold
            all images.
        told_by: where captions come from, for messages.
    """

    names: list[str]
    captions: list[str]
    splits: list[int] | None
    told_by: str


def read_pictures(root: Path, template: str, *, follow_links: bool, captioned: bool) -> Pictures:
    """Find the images below a folder, and the caption of each.

    Captions are the first line of ``NAME.txt`` or ``NAME.caption`` beside the image; the caption of
    an image without such a file is made from the class that its folder is named after: ``dog``, or
    ``10_dog`` and ``001.Dog``, of which the number is left out.

    Args:
        root: folder of the data set.
        template: template that makes a caption from a class, in the place of ``{}``.
        follow_links: look into linked folders, too.
        captioned: whether every image needs a caption.

    Raises:
        InvDiffError: if there is no image, or an image lacks the caption that it needs.
    """
    if snapshots := [path for form in _SNAPSHOTS for path in sorted(root.glob(form))]:
        raise InvDiffError(
            f"{root} is a cache of the Hugging Face hub: give the folder of one snapshot, "
            f"{snapshots[-1]}, and links=follow, since its files are links.",
            "links",
        )
    names, others, links = _walk(root, follow_links)
    if not names:
        raise InvDiffError(_nothing_in(root, links), "links", "table")
    beside = {_stem(name): name for name in others if Path(name).suffix.lower() in CAPTIONS}
    beside = {name: beside[_stem(name)] for name in names if _stem(name) in beside}
    captions = [_first_line(root / beside[name]) if name in beside else "" for name in names]
    captions = [
        caption or _of_class(name, template) for name, caption in zip(names, captions, strict=True)
    ]
    if captioned and not all(captions):
        raise InvDiffError(_uncaptioned(root, names, captions), "prompt")
    told_by = "the files beside the images" if beside else "the names of their folders"
    return Pictures(names, captions, _splits(names), told_by)


def _walk(root: Path, follow_links: bool) -> tuple[list[str], set[str], list[Path]]:
    """List relative paths of images and of other files, and linked folders not looked into."""
    images, others, links = [], set(), []
    for at, folders, files in walk(root, follow_links=follow_links):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if not follow_links:
            links += [at / name for name in folders if (at / name).is_symlink()]
        prefix = at.relative_to(root).as_posix()
        for name in files:
            path = name if prefix == "." else f"{prefix}/{name}"
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in IMAGES:
                images.append(path)
            else:
                others.add(path)
    return sorted(images), others, links


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _first_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InvDiffError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    return next((line.strip() for line in lines if line.strip()), "")


def _of_class(name: str, template: str) -> str:
    """Return the caption by an image's folder; empty if the folder names no class."""
    folders = Path(name).parts[:-1]
    folder = folders[-1] if folders else ""
    numbered = _NUMBERED.fullmatch(folder)
    unnamed = folder.lower() in SPLIT_NAMES or folder.lower() in _OF_ANYTHING
    if not folder or (unnamed and not numbered):
        return ""
    label = numbered[1] if numbered else folder
    return template.replace("{}", " ".join(label.replace("_", " ").split()))


def _splits(names: Sequence[str]) -> list[int] | None:
    tops = pd.Series([Path(name).parts[0].lower() if "/" in name else "" for name in names])
    splits = tops.map(SPLIT_NAMES)
    if splits.isna().any() or splits.nunique() < 2:
        return None
    return [int(split) for split in splits]


def _uncaptioned(root: Path, names: Sequence[str], captions: Sequence[str]) -> str:
    lacking = [name for name, caption in zip(names, captions, strict=True) if not caption]
    return (
        f"{root} holds no table, and {len(lacking)} of its {len(names)} images have no caption "
        f"(the first is {lacking[0]}): expected a table such as metadata.csv (file_name, text), a "
        "file of the image's name ending in .txt beside it, or a folder for each class; or give "
        'one prompt for all with prompt="a photo of a …".'
    )


def _nothing_in(root: Path, links: Sequence[Path]) -> str:
    linked = (
        f", and {links[0]} is a link, which is followed with links=follow only" if links else ""
    )
    return (
        f"{root} holds neither a table (metadata.csv, .tsv, .jsonl, .json or .parquet, or "
        f"captions.txt) nor an image{linked}: DATA must be the folder that holds them; a table of "
        "another name or place is named with table=."
    )
