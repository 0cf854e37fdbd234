"""LoRA: reversible, and the same in a stock diffusers pipeline."""

import json
from pathlib import Path

import pytest
import torch
from adapter_cases import disturb, draw_images, inputs
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from invdiff_pl.adapters import build_adapter, load_adapter
from invdiff_pl.backbones.noising import predict
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
        expected = predict(adapter.denoiser, *given)
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


def _plain_reader(folder: Path, backbone: Path) -> StableDiffusionPipeline:
    """A stock pipeline with a LoRA file of which only the matrices are read, as many programs do.

    Without an alpha in the file diffusers, too, takes the rank.
    """
    stock = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)
    stock.load_lora_weights(load_file(folder / "pytorch_lora_weights.safetensors"))
    return stock


def test_alpha_is_folded_into_the_file_so_that_every_reader_draws_the_same(
    tiny_backbone, tmp_path
) -> None:
    ours = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", ours.unet, rank=4, alpha=16)
    disturb(adapter)
    before = {name: value.clone() for name, value in adapter.parameters().items()}
    adapter.save(tmp_path)
    expected = draw_images(ours)

    assert adapter.settings()["alpha"] == 4
    assert all(torch.equal(value, before[name]) for name, value in adapter.parameters().items())
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as stored:
        header = json.loads(stored.metadata()["lora_adapter_metadata"])
    assert (header["unet.r"], header["unet.lora_alpha"]) == (4, 4)
    matrices = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    name, matrix = next(item for item in matrices.items() if "lora_B" in item[0])
    mine = name.removeprefix("unet.").replace(".weight", ".invdiff.weight")
    assert torch.equal(matrix, 4 * before[mine])

    again = load_pipeline(str(tiny_backbone))
    load_adapter(tmp_path, again.unet)
    stock = StableDiffusionPipeline.from_pretrained(tiny_backbone, safety_checker=None)
    stock.load_lora_weights(tmp_path)
    for reader in (again, stock, _plain_reader(tmp_path, tiny_backbone)):
        reader.set_progress_bar_config(disable=True)
        assert torch.equal(draw_images(reader), expected)


@pytest.mark.parametrize("alpha", [16, 4])
def test_files_of_another_alpha_are_read_as_they_were_meant(alpha, tiny_backbone, tmp_path) -> None:
    """Whatever alpha the configuration beside the file tells, and the file keeps its own."""
    ours = load_pipeline(str(tiny_backbone))
    adapter = build_adapter("lora", ours.unet, rank=4, alpha=16)
    disturb(adapter)
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=get_peft_model_state_dict(ours.unet, adapter_name="invdiff"),
        unet_lora_adapter_metadata={"r": 4, "lora_alpha": 16, "target_modules": ["to_q"]},
    )
    config = {"kind": "lora", "settings": {"rank": 4, "alpha": alpha}}
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    again = load_pipeline(str(tiny_backbone))
    load_adapter(tmp_path, again.unet)
    assert torch.equal(draw_images(again), draw_images(ours))


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
    with pytest.raises(InvDiffError, match=r"alpha=0: expected a number above 0"):
        build_adapter("lora", unet, alpha=0)
    with pytest.raises(InvDiffError, match="'everything' is unknown"):
        build_adapter("lora", unet, layers=("everything",))
