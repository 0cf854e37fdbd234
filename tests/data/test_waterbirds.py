"""Reading the Waterbirds layout, and what happens when it is damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.data.cache import ShardedTensor
from invdiff_pl.data.images import read_image, to_float
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.utils.errors import InvDiffError


def _module(root: Path, cache: Path, **settings) -> WaterbirdsDataModule:
    settings = {"backbone": "", "resolution": 32, "cache_dir": str(cache), **settings}
    return WaterbirdsDataModule(root=str(root), **settings)


@pytest.fixture
def changed(birds: Path, tmp_path: Path):
    """A copy of the data set with one replacement in its table."""

    def change(old: str, new: str) -> Path:
        root = tmp_path / "changed"
        shutil.copytree(birds, root)
        table = root / "metadata.csv"
        text = table.read_text()
        assert old in text
        table.write_text(text.replace(old, new, 1))
        return root

    return change


def test_species_prompts_come_from_the_folder_names(birds, tmp_path) -> None:
    prompts = _module(birds, tmp_path).prompts
    assert "a photo of an american goldfinch" in prompts
    assert "a photo of a mallard" in prompts
    assert len(prompts) == 6


def test_kind_prompts_come_from_the_labels(birds, tmp_path) -> None:
    module = _module(birds, tmp_path, prompt_by="kind")
    assert module.prompts == ("a photo of a landbird", "a photo of a waterbird")


def test_the_published_folder_names_are_understood(tmp_path) -> None:
    folder = tmp_path / "001.Black_footed_Albatross"
    folder.mkdir()
    name = "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"
    Image.new("RGB", (40, 30)).save(tmp_path / name)
    header = "img_id,img_filename,y,split,place,place_filename\n"
    (tmp_path / "metadata.csv").write_text(header + f"1,{name},1,0,0,/b/bamboo_forest/1.jpg\n")
    module = _module(tmp_path, tmp_path / "cache")
    assert module.prompts == ("a photo of a black footed albatross",)
    attributes = module.read_attributes()
    assert attributes is not None
    assert attributes.tolist() == [0]


def test_a_byte_order_mark_and_crlf_change_nothing(birds, tmp_path) -> None:
    root = tmp_path / "windows"
    shutil.copytree(birds, root)
    text = (birds / "metadata.csv").read_text().replace("\r\n", "\n")
    (root / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    theirs, ours = _module(root, tmp_path).index, _module(birds, tmp_path).index
    assert theirs.files == ours.files
    assert torch.equal(theirs.prompt_ids, ours.prompt_ids)
    assert torch.equal(theirs.splits, ours.splits)


def test_latents_are_those_of_the_vae_for_both_flips(birds, tiny_backbone, tmp_path) -> None:
    module = _module(birds, tmp_path, backbone=str(tiny_backbone))
    module.prepare_data()
    moments = ShardedTensor(module._folder("latents", "train"))
    rows = module.index.rows("train")
    row = 3
    image = to_float(read_image(module.index.paths(rows)[row], 32))[None]
    vae = load_pipeline(str(tiny_backbone)).vae
    with torch.no_grad():
        for flip, pixels in enumerate((image, image.flip(-1))):
            expected = vae.encode(pixels).latent_dist.parameters[0]
            cached = moments.gather(torch.tensor([row]), torch.tensor([flip]))[0]
            torch.testing.assert_close(cached.float(), expected, rtol=2e-3, atol=2e-3)


def test_the_cache_is_computed_once_and_found_by_content(
    birds, tiny_backbone, tmp_path, monkeypatch
) -> None:
    _module(birds, tmp_path, backbone=str(tiny_backbone)).prepare_data()
    moved = tmp_path / "elsewhere"
    shutil.copytree(birds, moved)  # other paths and times, the same content
    monkeypatch.setattr(
        "invdiff_pl.data.base.load_pipeline",
        lambda *_, **__: pytest.fail("the VAE was loaded again"),
    )
    _module(moved, tmp_path, backbone=str(tiny_backbone)).prepare_data()


def test_a_changed_image_changes_the_cache(birds, tiny_backbone, tmp_path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(birds, root)
    before = _module(root, tmp_path, backbone=str(tiny_backbone))._folder("latents", "train")
    module = _module(root, tmp_path, backbone=str(tiny_backbone))
    path = module.index.paths(module.index.rows("train"))[0]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    assert module._folder("latents", "train") != before


def test_a_missing_table_is_named(tmp_path) -> None:
    with pytest.raises(InvDiffError, match=r"metadata\.csv is missing"):
        _ = _module(tmp_path, tmp_path).index


def test_a_missing_folder_is_named(tmp_path) -> None:
    with pytest.raises(InvDiffError, match="nowhere does not exist"):
        _ = _module(tmp_path / "nowhere", tmp_path).index


def test_a_missing_column_is_named(changed, tmp_path) -> None:
    with pytest.raises(InvDiffError, match="lacks the column 'split'"):
        _ = _module(changed("split", "part"), tmp_path).index


def test_a_wrong_code_is_named_with_its_line(changed, tmp_path) -> None:
    root = changed(",0,0,0,", ",0,7,0,")
    with pytest.raises(InvDiffError, match=r"line 2: split is .*7.* from 0 to 2"):
        _ = _module(root, tmp_path).index


def test_a_path_out_of_the_folder_is_refused(changed, tmp_path) -> None:
    root = changed("001.Northern_cardinal/", "../001.Northern_cardinal/")
    with pytest.raises(InvDiffError, match="lies outside"):
        _ = _module(root, tmp_path).index


def test_a_missing_image_is_named(birds, tmp_path, tiny_backbone) -> None:
    root = tmp_path / "copy"
    shutil.copytree(birds, root)
    module = _module(root, tmp_path, backbone=str(tiny_backbone))
    path = module.index.paths(module.index.rows("train"))[0]
    path.unlink()
    with pytest.raises(InvDiffError, match=path.name):
        module.prepare_data()


def test_attributes_are_absent_without_their_column(changed, tmp_path) -> None:
    root = changed("place,", "scenery,")
    assert _module(root, tmp_path).read_attributes() is None
    module = _module(root, tmp_path, content="labelled_images")
    with pytest.raises(InvDiffError, match="no attribute labels"):
        module.train_dataloader()
