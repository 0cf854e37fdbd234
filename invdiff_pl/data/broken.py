"""Finding the images of an index that cannot be read, so that they can be left out."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from invdiff_pl.data.images import ImageFacts, inspect_image
from invdiff_pl.data.index import ImageIndex, InsideRoot, state_digest
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json, read_object, write_json
from invdiff_pl.utils.progress import track
from invdiff_pl.utils.threads import map_in_threads

_NAMED = 10


def inspect_files(
    index: ImageIndex, description: str, *, follow_links: bool = False
) -> Iterator[ImageFacts]:
    """Yield what each file of an index holds, in order, with a progress bar.

    Files are decoded in threads; a link that leaves the root is followed only if asked for.
    """
    inside = InsideRoot(index.root, follow_links=follow_links)

    def inspect(name: str) -> ImageFacts:
        try:
            inside.stat(name)
        except InvDiffError:
            return ImageFacts("it is a link that leaves the data folder", "outside")
        except (OSError, ValueError):
            pass  # the attempt to read it will report it
        return inspect_image(index.root / name)

    facts = map_in_threads(inspect, index.files)
    yield from track(facts, description, len(index))


def readable_rows(
    index: ImageIndex, memo_folder: Path, *, follow_links: bool = False
) -> tuple[Tensor, Path | None]:
    """Find the rows whose images can be read.

    The result is remembered for as long as every file keeps its size and modification time, so
    that all stages and ranks leave out the same images.

    Args:
        index: index of the whole data set.
        memo_folder: folder where the result is remembered.
        follow_links: count an image as readable if a link out of the root leads to it.

    Returns:
        int64 row numbers, ascending; and the file that lists the broken images, if there are any.

    Raises:
        InvDiffError: if no image can be read.
    """
    digest = state_digest(index.root, index.files, missing_ok=True, follow_links=follow_links)
    memo = memo_folder / f"{digest}.json"
    broken = _remembered(memo)
    if broken is None:
        inspected = inspect_files(index, "looking for broken images", follow_links=follow_links)
        problems = {
            name: facts.problem
            for name, facts in zip(index.files, inspected, strict=True)
            if facts.problem is not None
        }
        write_json(memo, {"root": str(index.root), "images": len(index), "broken": problems})
        broken = problems
    if not broken:
        return torch.arange(len(index)), None
    if len(broken) == len(index):
        name, reason = next(iter(broken.items()))
        raise InvDiffError(
            f"none of the {len(index)} images of {index.root} can be read; the first, {name}: "
            f"{reason}."
        )
    kept = [row for row, name in enumerate(index.files) if name not in broken]
    return torch.tensor(kept), memo


def _remembered(memo: Path) -> dict[str, str] | None:
    """Read the broken images from a memo; ``None`` if there is no memo, or a damaged one."""
    try:
        broken: dict[str, str] = read_object(memo, images=int, broken=dict)["broken"]
    except InvDiffError:
        return None
    return broken if all(isinstance(reason, str) for reason in broken.values()) else None


def describe_broken(memo: Path) -> str:
    """Say which images are left out, for the terminal: their number, and the first few by name."""
    found = read_json(memo)
    broken: dict[str, str] = found["broken"]
    lines = [f"left out {len(broken)} of {found['images']} images that cannot be read:"]
    lines += [f"  {name}: {reason}" for name, reason in list(broken.items())[:_NAMED]]
    if len(broken) > _NAMED:
        lines.append(f"  … all of them are listed in {memo}")
    return "\n".join(lines)
