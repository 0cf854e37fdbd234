"""Images with prompts, from any source: files, objects in memory, tables, data sets."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from invdiff_pl.data.images import read_image, read_images, to_rgb
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_folder

ImageLike = str | Path | Image.Image | Tensor | np.ndarray
_FORMS = "a path, a PIL image, a tensor [3, H, W] or an array [H, W, 3]"


class PromptedImages(Dataset[tuple[Image.Image, str]]):
    """A data set of N images, each with the prompt that it is an example of.

    Images are read when they are needed, and not kept.

    Args:
        images: paths, PIL images, tensors ``[3, H, W]`` (uint8, or float in [0, 1]) or arrays
            ``[H, W, 3]``; or one tensor ``[N, 3, H, W]``.
        prompts: one prompt per image, or a single text for all images.

    Attributes:
        prompts: the P distinct prompts, sorted.
        prompt_ids: int64 ``[N]``, the number of each image's prompt.

    Raises:
        ValueError: if there is no image, or the numbers of prompts and images differ.

    Example:
        >>> import torch
        >>> images = PromptedImages(torch.zeros(3, 3, 8, 8), ["a cat", "a dog", "a cat"])
        >>> images.prompts, images.prompt_ids.tolist()
        (('a cat', 'a dog'), [0, 1, 0])
        >>> images.pixels([0, 2], resolution=4).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, images: Sequence[ImageLike] | Tensor, prompts: str | Sequence[str]) -> None:
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        self._set(len(images), texts, lambda row: images[row])

    def _set(self, count: int, texts: Sequence[str], image: Callable[[int], Any]) -> None:
        if count == 0:
            raise InvDiffError("images: found none; expected at least one.")
        if len(texts) != count:
            raise InvDiffError(
                f"prompts: there are {len(texts)} for {count} images; expected one per image, or a "
                "single text for all."
            )
        wrong = next((n for n, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise InvDiffError(
                f"prompts: that of image {wrong} is {texts[wrong]!r}; expected a text."
            )
        self.prompts = tuple(sorted(set(texts)))
        numbers = {text: number for number, text in enumerate(self.prompts)}
        self.prompt_ids = torch.tensor([numbers[text] for text in texts], dtype=torch.int64)
        self._image = image

    @classmethod
    def from_table(cls, table: str | Path, **settings: Any) -> "PromptedImages":
        """Images listed in a table, stored beside it or in folders below.

        Args:
            table: CSV, TSV, JSON lines or Parquet.
            settings: as for :class:`~invdiff_pl.data.custom.TableDataModule`, such as
                ``file_column`` and ``prompt_column``.

        Raises:
            ValueError: naming the file, row or column that is wrong.
        """
        path = Path(table)
        return cls.from_folder(path.parent, table=path.name, **settings)

    @classmethod
    def from_folder(cls, folder: str | Path, **settings: Any) -> "PromptedImages":
        """Images of a folder, in any layout that ``EXP=custom`` reads, from all splits.

        Args:
            folder: folder of the images and of whatever names their prompts.
            settings: as for :class:`~invdiff_pl.data.custom.TableDataModule`.

        Raises:
            ValueError: naming the file, row or column that is wrong.
        """
        from invdiff_pl.data.custom import TableDataModule  # noqa: PLC0415 - Lightning takes seconds

        if not is_folder(Path(folder)):
            raise InvDiffError(f"folder={str(folder)!r}: there is no such folder.")
        index = TableDataModule(
            root=str(folder), backbone="", resolution=1, **settings
        ).read_index()
        texts = [index.prompts[number] for number in index.prompt_ids.tolist()]
        return cls([index.root / file for file in index.files], texts)

    @classmethod
    def from_hf(cls, dataset: Any, image: str = "image", prompt: str = "text") -> "PromptedImages":
        """Images of a Hugging Face ``datasets.Dataset``.

        Args:
            dataset: a data set with one row per image, not streamed.
            image: name of the column of images.
            prompt: name of the column of prompts.

        Raises:
            ValueError: if the data set lacks one of the columns.
        """
        columns = list(getattr(dataset, "column_names", []))
        for argument, name in (("image", image), ("prompt", prompt)):
            if name not in columns:
                raise InvDiffError(
                    f"{argument}={name!r}: the data set has no such column; it has "
                    f"{', '.join(columns) or 'none'}."
                )
        return cls._of(len(dataset), list(dataset[prompt]), lambda row: dataset[row][image])

    @classmethod
    def from_dataset(
        cls, dataset: Any, image: int | str = 0, prompt: int | str = 1
    ) -> "PromptedImages":
        """Images of any torch ``Dataset`` whose items hold an image and its prompt.

        Every item is read once for its prompt.

        Args:
            dataset: a data set with a length.
            image: index or key of the image in an item.
            prompt: index or key of the prompt in an item.

        Raises:
            ValueError: if an item lacks one of them.
        """
        try:
            texts = [dataset[row][prompt] for row in range(len(dataset))]
            return cls._of(len(dataset), texts, lambda row: dataset[row][image])
        except (KeyError, IndexError, TypeError) as error:
            raise InvDiffError(
                f"dataset: items have no {image!r} and {prompt!r} ({error}); name the fields that "
                "hold them with image= and prompt=."
            ) from None

    @classmethod
    def _of(cls, count: int, texts: Sequence[str], image: Callable[[int], Any]) -> "PromptedImages":
        made = cls.__new__(cls)
        made._set(count, texts, image)
        return made

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, row: int) -> tuple[Image.Image, str]:
        """Return the image and the prompt of a row."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"there is no image {row}: there are {len(self)}")
        return _picture(self._image(row % len(self)), row), self.prompts[int(self.prompt_ids[row])]

    def pixels(self, rows: Iterable[int], resolution: int) -> Tensor:
        """Read images, scaled so that the short side is ``resolution`` and cropped at the centre.

        Args:
            rows: rows of B images.
            resolution: side of the result in pixels.

        Returns:
            uint8 ``[B, 3, resolution, resolution]``.

        Raises:
            ValueError: naming the image that cannot be read.
        """
        images = [(row, self._image(row)) for row in rows]
        paths = [Path(image) for _, image in images if isinstance(image, str | Path)]
        if len(paths) == len(images):
            return read_images(paths, resolution)
        return torch.stack([_pixels(image, row, resolution) for row, image in images])

    def subset(self, rows: Sequence[int] | Tensor) -> "PromptedImages":
        """Return some of the images, as a data set of their own."""
        chosen = [int(row) for row in rows]
        texts = [self.prompts[int(self.prompt_ids[row])] for row in chosen]
        return self._of(len(chosen), texts, lambda row: self._image(chosen[row]))


def _pixels(image: Any, row: int, resolution: int) -> Tensor:
    if isinstance(image, str | Path):
        return read_image(Path(image), resolution)
    picture = _picture(image, row)
    if picture.size != (resolution, resolution):
        picture = ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _picture(image: Any, row: int) -> Image.Image:
    """Convert an image of any accepted form to RGB, upright.

    Raises:
        ValueError: if the form is not accepted.
    """
    if isinstance(image, str | Path):
        with Image.open(image) as file:
            return to_rgb(ImageOps.exif_transpose(file))
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        values = image.detach().cpu()
        if values.is_floating_point():
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise InvDiffError(
                    f"images: image {row} is a float tensor with values outside [0, 1]; scale it, "
                    "or give uint8."
                )
            values = (values * 255).round()
        return Image.fromarray(values.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    shape = f" of shape {list(image.shape)}" if hasattr(image, "shape") else ""
    raise InvDiffError(
        f"images: image {row} is a {type(image).__name__}{shape}; expected {_FORMS}."
    )
