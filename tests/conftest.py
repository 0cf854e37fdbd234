"""What the tests share: a tiny data set, and tiny untrained networks of every kind.

Fixtures import what they need: the process that hands tests to others needs no torch.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from invdiff_pl.data.waterbirds import WaterbirdsDataModule

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of processes that tests start, too: workers fight for no core, and sums have one order everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered data set; not to be changed."""
    from invdiff_pl.data.synthetic.waterbirds import RenderedWaterbirds, render_waterbirds

    root = tmp_path_factory.mktemp("birds") / "images"
    render_waterbirds(root, RenderedWaterbirds(fraction=0.02), progress=False)
    return root


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory, birds: Path) -> Path:
    """A pipeline folder with random weights; not to be changed."""
    from invdiff_pl.backbones.new_pipeline import tiny_pipeline

    folder = tmp_path_factory.mktemp("backbone") / "pipeline"
    names = sorted(path.name for path in birds.iterdir() if path.is_dir())
    prompts = [f"a photo of a {name.split('.')[1].replace('_', ' ').lower()}" for name in names]
    tiny_pipeline(prompts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def five(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set without one species, so that 5 x 5 samples divide by neither 2 nor 3."""
    root = tmp_path_factory.mktemp("five") / "images"
    shutil.copytree(birds, root)
    table = root / "metadata.csv"
    lines = table.read_text().splitlines()
    dropped = sorted(path.name for path in birds.iterdir() if path.is_dir())[0]
    table.write_text("\n".join(line for line in lines if dropped not in line) + "\n")
    return root


@pytest.fixture(scope="session")
def module_of(
    five: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> "Callable[..., WaterbirdsDataModule]":
    """Makes DataModules of the five prompts that share a cache."""
    from invdiff_pl.data.waterbirds import WaterbirdsDataModule

    cache = tmp_path_factory.mktemp("cache")

    def make(**settings) -> "WaterbirdsDataModule":
        shared = {"backbone": str(tiny_backbone), "resolution": 32, "cache_dir": str(cache)}
        return WaterbirdsDataModule(root=str(five), **{**shared, **settings})

    return make


@pytest.fixture(scope="session")
def environments(
    module_of: "Callable[..., WaterbirdsDataModule]", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two environments of the five prompts' images: every fifth goes against the others."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("environments")
    data = module_of()
    data.prepare_data()
    assignments = (torch.arange(len(data.index.rows("train"))) % 5 == 0).long()
    memberships = torch.nn.functional.one_hot(assignments, 2).float()
    scores = assignments + torch.linspace(0, 0.5, len(assignments))
    tensors = {"assignments": assignments, "memberships": memberships, "scores": scores}
    save_file(tensors, folder / "environments.safetensors")
    (folder / "environments.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def classifier(
    module_of: "Callable[..., WaterbirdsDataModule]", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An untrained classifier that tells all classes."""
    import torch

    from invdiff_pl.metrics.classifier import SampleClassifier

    folder = tmp_path_factory.mktemp("classifier")
    data = module_of()
    torch.manual_seed(0)
    network = SampleClassifier(attributes=2, prompts=len(data.prompts))
    facts = {
        "prompts": list(data.prompts),
        "attribute_names": list(data.attribute_names),
        "held_out_accuracy": {"attribute": 0.9, "prompt": 0.2},
        "held_out_confusion": {"attribute": [[45, 5], [5, 45]]},
    }
    network.save(folder, facts)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small CLIP and DINOv2 models with random weights."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    from invdiff_pl.backbones.new_pipeline import tiny_pipeline

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text = {**sizes, "num_attention_heads": 2, "vocab_size": 1024, "eos_token_id": 1}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder / "clip")
    pipeline = tiny_pipeline(["a photo of a bird"])
    pipeline.tokenizer.save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder / "clip")
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    Dinov2Model(config).save_pretrained(folder / "dinov2")
    return folder


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Path) -> Path:
    """A copy of ``experiments/`` to work in."""
    shutil.copytree(Path(__file__).parents[1] / "experiments", tmp_path / "experiments")
    shutil.copytree(tiny_backbone, tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    return tmp_path
