"""Images with prompts from every source that a library user has."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from invdiff_pl import PromptedImages
from invdiff_pl.utils.errors import InvDiffError

COLOURS = ("red", "blue", "red")


def _pictures() -> list[Image.Image]:
    return [Image.new("RGB", (6, 4), colour) for colour in COLOURS]


def _expected() -> torch.Tensor:
    """The pictures at 4 pixels, by hand."""
    red, blue = torch.tensor([255, 0, 0]), torch.tensor([0, 0, 255])
    rows = [red, blue, red]
    return torch.stack(rows)[:, :, None, None].expand(-1, -1, 4, 4).to(torch.uint8)


def _forms(folder: Path) -> dict[str, object]:
    pictures = _pictures()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    arrays = [np.asarray(picture) for picture in pictures]
    bytes_ = torch.stack([torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays])
    return {
        "paths": [str(folder / f"{number}.png") for number in range(3)],
        "PIL": pictures,
        "arrays": arrays,
        "uint8 tensor": bytes_,
        "float tensors": list(bytes_.float() / 255),
    }


@pytest.mark.parametrize("form", ["paths", "PIL", "arrays", "uint8 tensor", "float tensors"])
def test_every_form_of_image_gives_the_same_pixels(form: str, tmp_path) -> None:
    images = PromptedImages(_forms(tmp_path)[form], ["b", "a", "b"])  # type: ignore[arg-type]
    assert (images.prompts, images.prompt_ids.tolist()) == (("a", "b"), [1, 0, 1])
    assert torch.equal(images.pixels(range(3), 4), _expected())
    picture, prompt = images[1]
    assert (picture.size, picture.getpixel((0, 0)), prompt) == ((6, 4), (0, 0, 255), "a")


def test_one_text_is_the_prompt_of_all_and_a_subset_keeps_its_own() -> None:
    assert PromptedImages(_pictures(), "a flag").prompts == ("a flag",)
    chosen = PromptedImages(_pictures(), ["b", "a", "b"]).subset([1])
    assert (len(chosen), chosen.prompts, chosen[0][1]) == (1, ("a",), "a")


def test_any_torch_data_set_is_read_by_place_or_key() -> None:
    class Flags(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, row: int) -> dict:
            return {"picture": _pictures()[row], "caption": COLOURS[row]}

    images = PromptedImages.from_dataset(Flags(), image="picture", prompt="caption")
    assert images.prompts == ("blue", "red")
    assert torch.equal(images.pixels(range(3), 4), _expected())
    with pytest.raises(ValueError, match="image= and prompt="):
        PromptedImages.from_dataset(Flags())
    with pytest.raises(ValueError, match="expected a text"):
        PromptedImages.from_dataset(TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2)))


def test_a_hugging_face_data_set_is_read_by_columns() -> None:
    class Columns:
        """What is read of ``datasets.Dataset``: names, columns by name, rows by number."""

        column_names = ("image", "label")

        def __len__(self) -> int:
            return 3

        def __getitem__(self, key):
            return list(COLOURS) if key == "label" else {"image": _pictures()[key]}

    images = PromptedImages.from_hf(Columns(), prompt="label")
    assert torch.equal(images.pixels(range(3), 4), _expected())
    with pytest.raises(ValueError, match=r"prompt='text': .* it has image, label"):
        PromptedImages.from_hf(Columns())


def test_a_folder_with_a_table_is_read_whole(tmp_path) -> None:
    _forms(tmp_path)
    rows = "\n".join(f"{number}.png,{colour}" for number, colour in enumerate(COLOURS))
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}\n")
    for images in (
        PromptedImages.from_folder(tmp_path),
        PromptedImages.from_table(tmp_path / "metadata.csv"),
    ):
        assert images.prompts == ("blue", "red")
        assert torch.equal(images.pixels(range(3), 4), _expected())


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ([], [], "found none"),
        (torch.zeros(2, 3, 4, 4), ["a"], "there are 1 for 2 images"),
        ([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 3.0)], "a", "image 1 .* outside"),
        ([torch.zeros(4, 4)], "a", r"image 0 is a Tensor of shape \[4, 4\]"),
        ([object()], "a", "image 0 is a object"),
        (["nowhere.png"], "a", "nowhere.png cannot be read"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(images, prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        PromptedImages(images, prompts).pixels(range(len(images)), 4)


def test_public_names_are_listed_and_others_refused() -> None:
    import invdiff_pl

    for name in invdiff_pl.__all__:
        assert getattr(invdiff_pl, name) is not None
    assert issubclass(InvDiffError, ValueError)
    with pytest.raises(AttributeError, match="nothing"):
        _ = invdiff_pl.nothing
