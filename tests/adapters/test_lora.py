"""LoRA: a no-op at first, reversible, and the same in a stock diffusers pipeline."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from invdiff_pl.adapters import build_adapter, load_adapter
from invdiff_pl.diffusion.pipeline import embed_prompts, load_pipeline, sample_images
from invdiff_pl.errors import InvDiffError

SETTINGS = {"rank": 2, "layers": ["attention", "convolution", "time"]}


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 4, 16, 16, generator=source),
        torch.tensor([1, 500, 999]),
        torch.randn(3, 7, 16, generator=source),
    )


def _disturb(adapter) -> None:
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


@torch.no_grad()
def _images(pipeline: StableDiffusionPipeline) -> Tensor:
    embeddings = embed_prompts(pipeline, ["a photo of a mallard", ""])
    return sample_images(
        pipeline,
        embeddings[:1].repeat(2, 1, 1),
        embeddings[1:],
        [4, 5],
        seed=3,
        steps=3,
        guidance_scale=2.0,
    )


def test_an_untrained_adapter_predicts_as_the_backbone_bit_for_bit(tiny_backbone) -> None:
    frozen = load_pipeline(str(tiny_backbone)).unet
    adapted = build_adapter("lora", load_pipeline(str(tiny_backbone)).unet, **SETTINGS)
    noisy, timesteps, text = _inputs()
    with torch.no_grad():
        expected = frozen(noisy, timesteps, text).sample
        assert torch.equal(adapted.predict(noisy, timesteps, text), expected)


def test_only_update_matrices_are_trainable(tiny_backbone) -> None:
    unet = load_pipeline(str(tiny_backbone)).unet
    before = sum(parameter.numel() for parameter in unet.parameters())
    adapter = build_adapter("lora", unet, **SETTINGS)
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == adapter.size() > 0
    assert sum(p.numel() for p in unet.parameters()) == before + adapter.size()


def test_it_saves_and_loads_bit_for_bit(tiny_backbone, tmp_path) -> None:
    adapter = build_adapter("lora", load_pipeline(str(tiny_backbone)).unet, **SETTINGS)
    _disturb(adapter)
    adapter.save(tmp_path, backbone_size=1000)
    loaded = load_adapter(tmp_path, load_pipeline(str(tiny_backbone)).unet)
    assert loaded.parameters().keys() == adapter.parameters().keys()
    for name, parameter in adapter.parameters().items():
        assert torch.equal(loaded.parameters()[name], parameter)


def test_scale_zero_gives_the_backbones_images_exactly_even_after_another_scale(
    tiny_backbone,
) -> None:
    expected = _images(load_pipeline(str(tiny_backbone)))
    pipeline = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", pipeline.unet, **SETTINGS)
    _disturb(adapter)
    adapter.prepare_sampling(pipeline, 1.0)
    assert not torch.equal(_images(pipeline), expected)
    adapter.prepare_sampling(pipeline, 0.0)
    assert torch.equal(_images(pipeline), expected)


def test_folded_weights_predict_as_the_separate_updates(tiny_backbone) -> None:
    pipeline = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", pipeline.unet, **SETTINGS)
    _disturb(adapter)
    inputs = _inputs()
    with torch.no_grad():
        adapter.set_scale(0.7)
        expected = adapter.predict(*inputs)
        adapter.prepare_sampling(pipeline, 0.7)
        torch.testing.assert_close(pipeline.unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)


def test_a_stock_pipeline_with_the_saved_file_draws_the_same_images(
    tiny_backbone, tmp_path
) -> None:
    ours = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", ours.unet, **SETTINGS)
    _disturb(adapter)
    adapter.save(tmp_path, backbone_size=1000)
    adapter.prepare_sampling(ours, 1.0)

    stock = StableDiffusionPipeline.from_pretrained(tiny_backbone, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path)
    difference = (_images(stock).float() - _images(ours).float()).abs().max()
    assert difference <= 1  # of 255: folded and separate updates round differently


def test_the_backbones_weights_are_untouched(tiny_backbone) -> None:
    frozen = load_pipeline(str(tiny_backbone)).unet.state_dict()
    pipeline = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", pipeline.unet, **SETTINGS)
    _disturb(adapter)
    adapter.prepare_sampling(pipeline, 1.0)
    adapter.prepare_sampling(pipeline, 0.0)
    state = {n.replace(".base_layer", ""): v for n, v in pipeline.unet.state_dict().items()}
    for name, value in frozen.items():
        assert torch.equal(state[name], value)


def test_weights_of_another_backbone_are_refused(tiny_backbone, tmp_path) -> None:
    adapter = build_adapter("lora", load_pipeline(str(tiny_backbone)).unet, **SETTINGS)
    adapter.save(tmp_path, backbone_size=1000)
    (tmp_path / "adapter.json").write_text('{"kind": "lora", "settings": {"rank": 3}}')
    with pytest.raises(InvDiffError, match="another backbone"):
        load_adapter(tmp_path, load_pipeline(str(tiny_backbone)).unet)


def test_unknown_kinds_settings_and_layers_are_named(tiny_backbone) -> None:
    unet = load_pipeline(str(tiny_backbone)).unet
    with pytest.raises(InvDiffError, match="lora"):
        build_adapter("lorra", unet)
    with pytest.raises(InvDiffError, match="ranks"):
        build_adapter("lora", unet, ranks=2)
    with pytest.raises(InvDiffError, match="'everything' is unknown"):
        build_adapter("lora", unet, layers=("everything",))
