"""A data set's images, prompts and labels, before any pixels are read."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from invdiff_pl.data.broken import describe_broken, readable_rows
from invdiff_pl.data.index import ImageIndex
from invdiff_pl.data.scarce import without_rare_prompts
from invdiff_pl.data.training import LatentDataModule
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_folder

Split = Literal["train", "val", "test"]


class IndexedDataModule(LatentDataModule, ABC):
    """DataModule of a folder of images with prompts, splits and, for scoring only, an attribute.

    Args:
        root: folder of the data set.
        broken: what to do with an image that cannot be read: ``fail`` names it and stops;
            ``skip`` leaves it out, named and counted, in all stages alike. It is never replaced.
        links: what to do with an image that is a link to something outside ``root``: ``refuse``
            reads nothing there; ``follow`` does, as in a snapshot of the Hugging Face hub's cache.
        min_images_per_prompt: a prompt with fewer images in the train split is left out, named, in
            all stages alike; if that would leave out most images, nothing is run.
        cache_dir: folder of caches, which all runs share.
        settings: as for :class:`~invdiff_pl.data.training.LatentDataModule`.
    """

    def __init__(
        self,
        *,
        root: str,
        broken: Literal["fail", "skip"] = "fail",
        links: Literal["refuse", "follow"] = "refuse",
        min_images_per_prompt: int = 1,
        cache_dir: str = ".cache/invdiff",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.cache_dir = Path(cache_dir)
        self.broken = broken
        self.links = links
        if min_images_per_prompt < 1:
            raise InvDiffError(
                f"min_images_per_prompt={min_images_per_prompt}: expected 1 or more.",
                "min_images_per_prompt",
            )
        self.min_images_per_prompt = min_images_per_prompt
        self._index: ImageIndex | None = None
        self._kept: Tensor | None = None

    attribute = "attribute"  # its name in figures

    @property
    @abstractmethod
    def attribute_names(self) -> Sequence[str]:
        """The attribute's classes in the order of their codes."""

    @abstractmethod
    def read_index(self) -> ImageIndex:
        """Read files, prompts and splits."""

    @abstractmethod
    def read_attributes(self) -> Tensor | None:
        """Read the attribute class of each image, int64 ``[N]``, for scoring only.

        ``None`` if the data set has no such labels.
        """

    @property
    def index(self) -> ImageIndex:
        """The index, read once."""
        if self._index is None:
            if not is_folder(self.root):
                raise InvDiffError(
                    f"data folder {self.root} does not exist: give the data set's folder with "
                    "root= (or, of make, DATA=).",
                    "root",
                )
            self._index = self._usable(self.read_index())
        return self._index

    @property
    def told(self) -> list[str]:
        """Messages for the user: what was read, from where, what was left out; none by default."""
        return []

    @property
    def follow_links(self) -> bool:
        """Whether images outside the root are read."""
        return self.links == "follow"

    def _usable(self, index: ImageIndex) -> ImageIndex:
        """Return the index without rare prompts and, if so set, without broken images."""
        kept = torch.arange(len(index))
        if self.broken == "skip":
            kept, listed = readable_rows(
                index, self.cache_dir / "broken", follow_links=self.follow_links
            )
            if listed is not None:
                index = index.subset(kept)
                rank_zero_only(print)(describe_broken(listed))
        index, rows, told = without_rare_prompts(index, self.min_images_per_prompt)
        if told is not None:
            rank_zero_only(print)(told)
        self._kept = kept[rows]
        return index

    def attributes(self) -> Tensor | None:
        """Return the attribute class of each image of :attr:`index`, int64 ``[N]``, for scoring."""
        attributes = self.read_attributes()
        if attributes is None:
            return None
        _ = self.index  # finds out which images are left out
        return attributes if self._kept is None else attributes[self._kept]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The distinct prompts; batches hold numbers into them."""
        return self.index.prompts

    def train_prompts(self) -> Tensor:
        """Return the number of each image's prompt in the train split, int64 ``[N]``."""
        return self._prompts("train")

    @property
    def why_not_scored(self) -> str:
        """Reason given for figures that are missing because there are no attribute labels."""
        return f"{self.root} has no attribute labels to score samples with"

    def labels(self, split: Split) -> tuple[Tensor, Tensor | None]:
        """Return the prompt and the attribute of each image of a split, for scoring only."""
        rows = self.index.rows(split)
        attributes = self.attributes()
        return self.index.prompt_ids[rows], None if attributes is None else attributes[rows]

    def _prompts(self, split: Split) -> Tensor:
        return self.index.prompt_ids[self.index.rows(split)]
