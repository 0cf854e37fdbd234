"""Biased splits, drawn by ratio from a data set whose attributes are labelled.

The labels serve to make the *data set*, as they did for the published biased splits. They are read
once, to write an index of files, prompts and splits; training and inference read only that index.
"""

import io
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.index import SPLITS, ImageIndex, index_images
from invdiff_pl.data.tables import encode, read_table
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_json, write_json, write_text

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """All images of a data set that have a prompt, with their labels.

    Attributes:
        files: relative path of each image.
        prompts: the distinct prompts.
        prompt_ids: int64 ``[N]``, numbers of ``prompts``.
        attributes: class of each image, int64 ``[N]``.
        splits: int64 ``[N]``, numbers of ``SPLITS``.
    """

    files: NDArray[Any]
    prompts: tuple[str, ...]
    prompt_ids: Counts
    attributes: Counts
    splits: Counts


class RatioDataModule(BiasedDataModule):
    """DataModule that draws its splits from labelled images, the train split by a ratio of groups.

    The val and test splits hold equally many images of each (prompt, attribute) group.

    Args:
        ratio: sizes of the train split's groups, prompt by prompt and class by class, such as
            ``"1:4:4:1"``: 1 of the first prompt's first class, 4 of its second, and so on.
        train_size: number of images in the train split; as many as possible if not given.
        evaluation_size: maximum number of images in each of val and test; as many as possible if
            not given.
        split_seed: seed of the draw.
        **settings: as for :class:`BiasedDataModule`.
    """

    def __init__(
        self,
        *,
        ratio: str,
        train_size: int | None = None,
        evaluation_size: int | None = None,
        split_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.ratio = ratio
        self.train_size = train_size
        self.evaluation_size = evaluation_size
        self.split_seed = split_seed

    @abstractmethod
    def label_files(self) -> list[Path]:
        """Return the tables that files, prompts, attributes and splits come from."""

    @abstractmethod
    def read_labelled(self) -> LabelledImages:
        """Read those tables."""

    def read_index(self) -> ImageIndex:
        """Read the drawn splits, after drawing them if that has not been done yet."""
        path = self._index_file()
        if not path.is_file():
            self._draw(path)
        table = read_table(path, ["file", "prompt", "split"])
        splits = encode(table["split"], "split", {name: i for i, name in enumerate(SPLITS)}, path)
        return index_images(self.root, table["file"], table["prompt"], splits, path)

    def read_attributes(self) -> Tensor | None:
        """Return the attribute class of each image of the index, for scoring only."""
        labelled = self.read_labelled()
        attributes = pd.Series(labelled.attributes, index=labelled.files)
        files = pd.Index(self.read_index().files)
        if not (known := files.isin(attributes.index)).all():
            path = self._index_file()
            raise InvDiffError(
                f"{path} names {files[~known][0]!r}, which the data set's tables do not: delete "
                "that file and rerun."
            )
        return torch.tensor(attributes.loc[files].to_numpy())

    def _index_file(self) -> Path:
        tables = [(str(path), path.stat()) for path in self.label_files()]
        key = {
            "tables": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in tables],
            "ratio": self.ratio,
            "sizes": [self.train_size, self.evaluation_size],
            "seed": self.split_seed,
        }
        return self.cache_dir / "splits" / f"{digest_json(key)}.csv"

    def _draw(self, path: Path) -> None:
        labelled = self.read_labelled()
        classes = len(self.attribute_names)
        ratio = parse_ratio(self.ratio, len(labelled.prompts), classes)
        source = np.random.default_rng(self.split_seed)
        groups = labelled.prompt_ids * classes + labelled.attributes
        names = [f"{p!r}, {name}" for p in labelled.prompts for name in self.attribute_names]
        chosen, counts = [], {}
        for split, name in enumerate(SPLITS):
            rows = np.flatnonzero(labelled.splits == split)
            wanted, size = (
                (ratio, self.train_size)
                if name == "train"
                else (np.ones_like(ratio), self.evaluation_size)
            )
            available = np.bincount(groups[rows], minlength=ratio.size)
            if name != "train" and size is not None:
                size = min(size, int(available.min()) * ratio.size)
            taken = group_sizes(available, wanted, size, names, f"the {name} split")
            chosen.append(draw_groups(rows, groups[rows], taken, source))
            counts[name] = dict(zip(names, taken.tolist(), strict=True))
        rows = np.concatenate(chosen)
        table = pd.DataFrame(
            {
                "file": labelled.files[rows],
                "prompt": np.array(labelled.prompts)[labelled.prompt_ids[rows]],
                "split": np.array(SPLITS)[labelled.splits[rows]],
            }
        )
        text = io.StringIO()
        table.to_csv(text, index=False, lineterminator="\n")
        write_json(path.with_suffix(".json"), {"ratio": self.ratio, "groups": counts})
        write_text(path, text.getvalue())
        print(f"split {self.ratio} drawn, {path.with_suffix('.json')}:")
        for name, sizes in counts.items():
            print(f"  {name}: " + "; ".join(f"{group} {size}" for group, size in sizes.items()))


def parse_ratio(ratio: str, prompts: int, classes: int) -> Counts:
    """Parse the parts of each group, int64 ``[prompts * classes]``, from ``"1:4:4:1"``.

    Raises:
        InvDiffError: if there are not that many numbers, or they are not whole numbers from 1 on.
    """
    parts = ratio.split(":")
    count = prompts * classes
    if len(parts) != count or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise InvDiffError(
            f"ratio={ratio}: expected {count} whole numbers from 1 on, of {prompts} prompts "
            f"by {classes} attribute classes, such as {':'.join(['1'] * count)}.",
            "ratio",
        )
    return np.array([int(part) for part in parts], dtype=np.int64)


def group_sizes(
    available: Counts, ratio: Counts, size: int | None, names: list[str], where: str
) -> Counts:
    """Compute the number of images to draw from each group, int64 ``[groups]``.

    Args:
        available: number of images in each group.
        ratio: parts of each group.
        size: size of all groups together; the largest at which the ratio holds exactly, if not
            given.
        names: names of the groups.
        where: what is drawn from, to be named in errors.

    Raises:
        InvDiffError: if a group has too few images.
    """
    if size is None:
        unit = int((available // ratio).min())
        if unit == 0:
            short = int((available // ratio).argmin())
            raise InvDiffError(
                f"{where} has {available[short]} images of the group ({names[short]}), fewer than "
                f"the ratio's {ratio[short]}: give another `ratio`, or more images.",
                "ratio",
            )
        return unit * ratio
    exact = size * ratio / ratio.sum()
    sizes = np.floor(exact).astype(np.int64)
    # What rounding down leaves over goes to the groups that lost most.
    left = size - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:left]] += 1
    if (sizes > available).any():
        short = int((available - sizes).argmin())
        largest = int((available // ratio).min() * ratio.sum())
        raise InvDiffError(
            f"{where} has {available[short]} images of the group ({names[short]}), but "
            f"{sizes[short]} are asked for: at this ratio at most {largest} images in all can be "
            "drawn; give a smaller `train_size`, or another `ratio`.",
            "train_size",
            "ratio",
        )
    return sizes


def draw_groups(rows: Counts, groups: Counts, sizes: Counts, source: np.random.Generator) -> Counts:
    """Draw ``sizes`` rows of each group, without replacement; ascending.

    Args:
        rows: rows to draw from, int64 ``[N]``.
        groups: group of each row, int64 ``[N]``.
        sizes: number of rows to draw from each group.
        source: source of the draw.
    """
    order = source.permutation(len(rows))
    order = order[np.argsort(groups[order], kind="stable")]
    counts = np.bincount(groups, minlength=len(sizes))
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(rows[order[rank < np.repeat(sizes, counts)]])
