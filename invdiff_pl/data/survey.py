"""Survey of a data set: what it holds, what is broken, how large the groups are."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.broken import inspect_files
from invdiff_pl.data.images import ImageFacts
from invdiff_pl.data.index import SPLITS, ImageIndex
from invdiff_pl.data.scarce import ONE_PROMPT, without_rare_prompts
from invdiff_pl.utils.errors import InvDiffError

# Problems by kind: what they are called, in the order in which they are reported.
KINDS = {
    "missing": "missing",
    "empty": "empty (zero bytes)",
    "unreadable": "unreadable or truncated",
    "outside": "links that leave the folder",
}
_NAMED = 5


@dataclass
class Tally:
    """Number of files that something holds for, and the first few of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a file."""
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(name)

    def __str__(self) -> str:
        return ", ".join(self.first) + (", …" if self.count > len(self.first) else "")


@dataclass
class Survey:
    """What a data set holds.

    Attributes:
        images: number of images listed in its table.
        broken: unusable files by kind, see ``KINDS``.
        small: readable images with a side shorter than the resolution, which are enlarged.
        turned: readable images that are turned by their EXIF tag.
        modes: readable images by Pillow's name of their mode.
        prompts: the distinct prompts.
        classes: the attribute's classes, empty if there is no attribute.
        groups: readable images by split, prompt and class, int64 ``[3, P, max(1, K)]``.
        mend: problems that keep the data set from being used, and what to do about them.
        notes: facts that are worth knowing but do no harm.
    """

    images: int
    prompts: tuple[str, ...]
    classes: tuple[str, ...]
    broken: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in KINDS})
    small: Tally = field(default_factory=Tally)
    turned: Tally = field(default_factory=Tally)
    modes: Counter[str] = field(default_factory=Counter)
    groups: Tensor = field(default_factory=lambda: torch.zeros(0))
    mend: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def survey(data: BiasedDataModule) -> Survey:
    """Read a data set's tables and decode every image, streaming, with a progress bar.

    Raises:
        InvDiffError: if a table cannot be used.
    """
    index, attributes = data.read_index(), data.read_attributes()
    classes = () if attributes is None else tuple(data.attribute_names)
    found = Survey(len(index), index.prompts, classes, notes=list(data.told))
    usable = torch.ones(len(index), dtype=torch.bool)
    inspected = inspect_files(index, "reading images", follow_links=data.follow_links)
    for row, facts in enumerate(inspected):
        usable[row] = facts.problem is None
        _count(found, index.files[row], facts, data.resolution)
    codes = torch.zeros(len(index), dtype=torch.int64) if attributes is None else attributes
    found.groups = group_counts(index, codes, max(1, len(classes)), usable)
    _judge_files(found, data)
    _judge_groups(found, index.subset(usable.nonzero().squeeze(1)), data.min_images_per_prompt)
    return found


def group_counts(index: ImageIndex, codes: Tensor, classes: int, usable: Tensor) -> Tensor:
    """Count usable images by split, prompt and attribute class.

    Args:
        index: index of N images of P prompts.
        codes: attribute class of each image, int64 ``[N]``.
        classes: K, the number of classes.
        usable: which images count, bool ``[N]``.

    Returns:
        int64 ``[3, P, K]``.
    """
    prompts = len(index.prompts)
    cells = ((index.splits * prompts + index.prompt_ids) * classes + codes)[usable]
    counts = cells.bincount(minlength=len(SPLITS) * prompts * classes)
    return counts.reshape(len(SPLITS), prompts, classes)


def _count(found: Survey, name: str, facts: ImageFacts, resolution: int) -> None:
    if facts.problem is not None:
        told = f"{name} ({facts.problem})" if facts.kind == "unreadable" else name
        found.broken[facts.kind].add(told)
        return
    found.modes[facts.mode] += 1
    if min(facts.width, facts.height) < resolution:
        found.small.add(name)
    if facts.turned:
        found.turned.add(name)


def _judge_files(found: Survey, data: BiasedDataModule) -> None:
    total = sum(tally.count for tally in found.broken.values())
    for kind, tally in found.broken.items():
        if tally.count and data.broken == "fail":
            follow = ". Read them with links=follow" if kind == "outside" else ""
            found.mend.append(f"{tally.count} {KINDS[kind]}: {tally}{follow}")
    if total and data.broken == "fail":
        found.mend[-1] += (
            ". Restore the files, remove their rows, or leave them out with broken=skip"
        )
    elif total:
        found.notes.append(f"{total} images are left out (broken=skip)")
    if found.small.count:
        found.notes.append(
            f"{found.small.count} images have a side shorter than {data.resolution} pixels and are "
            f"enlarged: {found.small}"
        )
    if found.turned.count:
        found.notes.append(f"{found.turned.count} images are turned upright according to EXIF")


def _judge_groups(found: Survey, usable: ImageIndex, least: int) -> None:
    if not len(usable):
        return  # the files' problems have been reported
    try:
        rest, _, told = without_rare_prompts(usable, least)
    except InvDiffError as error:
        found.mend.append(str(error).rstrip("."))
    else:
        if told is not None:
            found.notes.append(told)
        if len(rest.prompts) == 1:
            found.notes.append(ONE_PROMPT)
    if not found.classes:
        found.notes.append("there is no attribute: nothing will be scored")
        return
    val, test = found.groups[1], found.groups[2]
    if not val.sum():
        found.mend.append("the val split, which trains the classifier that scores, has no image")
    complete = (test > 0).all(1)
    if not complete.any():
        found.mend.append(
            "no prompt has test images of every attribute class, so there is no balanced set to "
            "measure the Fréchet distance to: add some"
        )
    elif not complete.all():
        found.notes.append(
            f"{int((~complete).sum())} prompts lack test images of some attribute class and are "
            "left out of the balanced set that the Fréchet distance is measured to"
        )
