"""LoRA: reversible, and the same in a stock diffusers pipeline."""

import pytest
import torch
from adapter_cases import disturb, draw_images, inputs
from diffusers import StableDiffusionPipeline

from invdiff_pl.adapters import build_adapter, load_adapter
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.utils.errors import InvDiffError

SETTINGS = {"rank": 2, "layers": ["attention", "convolution", "time"]}


def test_only_update_matrices_are_trainable(tiny_backbone) -> None:
    unet = load_pipeline(str(tiny_backbone)).unet
    before = sum(parameter.numel() for parameter in unet.parameters())
    adapter = build_adapter("lora", unet, **SETTINGS)
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == adapter.size() > 0
    assert sum(p.numel() for p in unet.parameters()) == before + adapter.size()


def test_folded_weights_predict_as_the_separate_updates(tiny_backbone) -> None:
    pipeline = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", pipeline.unet, **SETTINGS)
    disturb(adapter)
    given = inputs()
    with torch.no_grad():
        adapter.set_scale(0.7)
        expected = adapter.predict(*given)
        adapter.prepare_sampling(pipeline, 0.7)
        torch.testing.assert_close(pipeline.unet(*given).sample, expected, rtol=1e-4, atol=1e-5)


def test_a_stock_pipeline_with_the_saved_file_draws_the_same_images(
    tiny_backbone, tmp_path
) -> None:
    ours = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", ours.unet, **SETTINGS)
    disturb(adapter)
    adapter.save(tmp_path)
    adapter.prepare_sampling(ours, 1.0)

    stock = StableDiffusionPipeline.from_pretrained(tiny_backbone, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path)
    difference = (draw_images(stock).float() - draw_images(ours).float()).abs().max()
    assert difference <= 1  # of 255: folded and separate updates round differently


def test_the_backbones_weights_are_untouched(tiny_backbone) -> None:
    frozen = load_pipeline(str(tiny_backbone)).unet.state_dict()
    pipeline = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", pipeline.unet, **SETTINGS)
    disturb(adapter)
    adapter.prepare_sampling(pipeline, 1.0)
    adapter.prepare_sampling(pipeline, 0.0)
    state = {n.replace(".base_layer", ""): v for n, v in pipeline.unet.state_dict().items()}
    for name, value in frozen.items():
        assert torch.equal(state[name], value)


def test_weights_of_another_backbone_are_refused(tiny_backbone, tmp_path) -> None:
    adapter = build_adapter("lora", load_pipeline(str(tiny_backbone)).unet, **SETTINGS)
    adapter.save(tmp_path)
    (tmp_path / "adapter.json").write_text('{"kind": "lora", "settings": {"rank": 3}}')
    with pytest.raises(InvDiffError, match="another backbone"):
        load_adapter(tmp_path, load_pipeline(str(tiny_backbone)).unet)


def test_unknown_kinds_settings_and_layers_are_named(tiny_backbone) -> None:
    unet = load_pipeline(str(tiny_backbone)).unet
    with pytest.raises(InvDiffError, match="lora"):
        build_adapter("lorra", unet)
    with pytest.raises(InvDiffError, match="no setting 'ranks'"):
        build_adapter("lora", unet, ranks=2)
    with pytest.raises(InvDiffError, match="'everything' is unknown"):
        build_adapter("lora", unet, layers=("everything",))
