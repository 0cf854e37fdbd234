"""What the tests share: a tiny data set and a tiny untrained backbone."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from invdiff_pl.data.synthetic.waterbirds import RenderedWaterbirds, render_waterbirds
from invdiff_pl.diffusion.architecture import Architecture, new_pipeline

TINY = Architecture(
    vae_channels=(8, 8), unet_channels=(16, 16), attention_levels=1, heads=2, text_width=16
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered data set; not to be changed."""
    root = tmp_path_factory.mktemp("birds") / "images"
    render_waterbirds(root, RenderedWaterbirds(fraction=0.02), progress=False)
    return root


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory, birds: Path) -> Path:
    """A pipeline folder with random weights; not to be changed."""
    folder = tmp_path_factory.mktemp("backbone") / "pipeline"
    names = sorted(path.name for path in birds.iterdir() if path.is_dir())
    prompts = [f"a photo of a {name.split('.')[1].replace('_', ' ').lower()}" for name in names]
    new_pipeline(TINY, prompts, seed=0).save_pretrained(folder)
    return folder
