"""A data set that the frozen model has drawn itself, from prompts alone."""

import math
from typing import Any

from torch import Tensor

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.index import SPLITS, ImageIndex, index_images
from invdiff_pl.data.prompt_lists import read_prompts
from invdiff_pl.data.samples import MANIFEST, read_manifest
from invdiff_pl.utils.errors import InvDiffError

# Least numbers of images per prompt, and in all: details such as the gender of rendered faces are
# found among some thousands of images.
_LEAST_EACH, _LEAST_IN_ALL = 512, 3000


class GeneratedDataModule(BiasedDataModule):
    """Reads images that ``invdiff_pl.modules.ImageGeneration`` drew; all are for training.

    The images have no labels, so nothing is scored.

    Args:
        prompts: prompts in any form that :func:`~invdiff_pl.data.prompt_lists.read_prompts` takes:
            a list that ships with the package, a file, or
            ``"a photo of a nurse; a photo of a pilot"``.
        per_prompt: number of images per prompt that are drawn first; if not given, 512 or, for
            fewer than six prompts, enough to make 3000 in all.
        samples_per_prompt: number of samples per prompt; ``per_prompt`` if not given.
        settings: as for :class:`~invdiff_pl.data.base.BiasedDataModule`.

    Raises:
        InvDiffError: if there is no prompt, or a setting is out of range.
    """

    attribute_names = ()

    def __init__(
        self,
        *,
        prompts: str,
        per_prompt: int | None = None,
        samples_per_prompt: int | None = None,
        **settings: Any,
    ) -> None:
        if per_prompt is not None and per_prompt < 1:
            raise InvDiffError(f"per_prompt={per_prompt}: expected at least 1.", "per_prompt")
        self.texts = tuple(sorted(read_prompts(prompts)))
        enough = max(_LEAST_EACH, math.ceil(_LEAST_IN_ALL / len(self.texts)))
        self.per_prompt = enough if per_prompt is None else per_prompt
        drawn = self.per_prompt if samples_per_prompt is None else samples_per_prompt
        super().__init__(samples_per_prompt=drawn, **settings)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The distinct prompts; known before anything is drawn."""
        return self.texts

    @property
    def why_not_scored(self) -> str:
        """Reason given for missing figures."""
        return (
            "nobody has labelled the images, which the backbone drew itself; `python -m invdiff_pl "
            "audit` with --lora= counts what it draws before and after"
        )

    def read_index(self) -> ImageIndex:
        """Read the images that were drawn.

        Raises:
            InvDiffError: if nothing was drawn, or the images are of other prompts.
        """
        drawn = read_manifest(self.root)
        found = {sample.prompt for sample in drawn}
        if found != set(self.texts):
            other = sorted(found ^ set(self.texts))[0]
            raise InvDiffError(
                f"prompts: {self.root / MANIFEST} holds images of other prompts, such as "
                f"{other!r}; give the prompts they were drawn for, or another run folder.",
                "prompts",
            )
        return index_images(
            self.root,
            [sample.file for sample in drawn],
            [sample.prompt for sample in drawn],
            [SPLITS.index("train")] * len(drawn),
            self.root / MANIFEST,
        )

    def read_attributes(self) -> Tensor | None:
        """Return ``None``: there are no attributes."""
        return None
