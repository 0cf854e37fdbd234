"""The DINOv2 extractor, with an untrained model."""

from pathlib import Path

import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from invdiff_pl.metrics import MissingWeightsError, build_extractor
from invdiff_pl.utils.errors import InvDiffError

IMAGES = torch.randint(
    0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_features_are_the_class_token_of_the_models_own_forward_pass(folder: Path) -> None:
    extractor = build_extractor("dinov2", folder, 28)
    processor = BitImageProcessor(
        do_resize=False,
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels = processor(images=list(IMAGES), return_tensors="pt")["pixel_values"]
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert extractor.num_features == 32
    torch.testing.assert_close(extractor(IMAGES), expected, atol=1e-5, rtol=1e-5)


def test_missing_and_foreign_folders_and_odd_sizes_are_told_apart(
    folder: Path, tmp_path: Path
) -> None:
    for weights in (None, tmp_path / "nowhere"):
        with pytest.raises(MissingWeightsError, match="dinov2"):
            build_extractor("dinov2", weights)
    with pytest.raises(InvDiffError, match="holds no DINOv2 model"):
        build_extractor("dinov2", tmp_path)
    with pytest.raises(InvDiffError, match="multiple of 14, not 30"):
        build_extractor("dinov2", folder, 30)
