"""CLIP-T, with an untrained CLIP model."""

import pickle
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from invdiff_pl.backbones.architecture import Architecture
from invdiff_pl.backbones.new_pipeline import new_pipeline
from invdiff_pl.metrics.clip import ClipEncoder, ClipScore
from invdiff_pl.utils.errors import InvDiffError

PROMPTS = ("a photo of a mallard", "a photo of a common raven")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, "num_attention_heads": 2, "vocab_size": 1024, "eos_token_id": 1},
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    new_pipeline(Architecture(), PROMPTS, 0).tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def test_scores_are_the_cosines_of_the_models_own_forward_pass(clip_folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8, generator=generator)
    prompts = torch.tensor([0, 1, 1, 0, 1])
    encoder = ClipEncoder(str(clip_folder))
    tokens = encoder.tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(
        images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits_per_image / model.logit_scale.exp()
    expected = 100 * logits[torch.arange(5), prompts].double()

    metric = ClipScore(encoder, PROMPTS)
    metric.update(prompts[:2], images[:2])
    metric.update(prompts[2:], images[2:])
    found = metric.compute()
    assert float(found["mean"]) == pytest.approx(float(expected.mean()), abs=1e-3)
    for prompt in (0, 1):
        own = expected[prompts == prompt].mean()
        assert float(found["per_prompt"][prompt]) == pytest.approx(float(own), abs=1e-3)


def test_a_pickled_or_cloned_score_goes_on_on_its_own(clip_folder: Path) -> None:
    images = torch.zeros((2, 3, 32, 32), dtype=torch.uint8)
    metric = ClipScore(ClipEncoder(str(clip_folder)), PROMPTS)
    metric.update(torch.tensor([0, 1]), images)
    assert not metric.state_dict()
    copies = [pickle.loads(pickle.dumps(metric)), metric.clone()]
    for copy in copies:
        assert isinstance(copy, ClipScore)
        assert copy.compute()["mean"] == metric.compute()["mean"]
        copy.update(torch.tensor([0, 0]), images)
        assert copy.count.tolist() == [3, 1]
    assert metric.count.tolist() == [1, 1]


def test_a_missing_model_is_named_with_the_flag(tmp_path: Path) -> None:
    with pytest.raises(InvDiffError, match=r"nowhere.*give the folder of one"):
        ClipEncoder(str(tmp_path / "nowhere"))


def test_no_image_is_refused(clip_folder: Path) -> None:
    with pytest.raises(InvDiffError, match="at least one image"):
        ClipScore(ClipEncoder(str(clip_folder)), PROMPTS).compute()
