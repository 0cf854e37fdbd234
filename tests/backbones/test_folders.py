"""Loading folders as people have them, and writing folders that load with no more arguments."""

import json
import shutil

import pytest
import torch
from backbone_cases import TAKEN
from diffusers import StableDiffusionPipeline

from invdiff_pl.backbones.assets import resolve_backbone
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.folders import make_portable, pipeline_variant, weights_variant
from invdiff_pl.backbones.pipeline import load_pipeline, save_pipeline

PROMPT = "a photo of a mallard"


def _weights(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(pipeline: StableDiffusionPipeline) -> set[torch.dtype]:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    return {parameter.dtype for part in parts for parameter in part.parameters()}


def _draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(0)
    images: torch.Tensor = pipeline(
        PROMPT, num_inference_steps=1, generator=source, output_type="pt"
    ).images
    return images


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        (["diffusion_pytorch_model.safetensors"], None),
        (["diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "bf16"),
        (["model.non_ema.safetensors"], "non_ema"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], None),
        (["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"], "fp16"),
        (["diffusion_pytorch_model.bin", "other.fp16.safetensors"], None),
        ([], None),
    ],
)
def test_the_variant_is_told_by_the_names_of_the_files(files, variant, tmp_path) -> None:
    (tmp_path / "unet").mkdir()
    for name in files:
        (tmp_path / "unet" / name).touch()
    assert weights_variant(tmp_path / "unet") == variant
    assert pipeline_variant(tmp_path) == variant


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in TAKEN), ("mixed", torch.bfloat16)]
)
def test_all_parts_are_loaded_in_one_dtype(name, dtype, tiny_backbone, tmp_path) -> None:
    TAKEN[name](tiny_backbone, tmp_path / name)
    pipeline = load_pipeline(str(tmp_path / name), _weights(dtype))
    assert _dtypes(pipeline) == {dtype}
    assert frozen_denoiser(pipeline).condition([PROMPT])["prompt_embeds"].shape[1] == 16


def test_a_variant_draws_as_the_plain_folder_of_the_same_weights(tiny_backbone, tmp_path) -> None:
    TAKEN["half"](tiny_backbone, tmp_path / "half")
    TAKEN["variant"](tiny_backbone, tmp_path / "variant")
    plain, variant = (_draw(load_pipeline(str(tmp_path / name))) for name in ("half", "variant"))
    assert torch.equal(plain, variant)


@pytest.mark.parametrize("name", TAKEN)
def test_a_portable_copy_is_drawn_from_by_a_plain_call_of_diffusers(
    name, tiny_backbone, tmp_path
) -> None:
    TAKEN[name](tiny_backbone, tmp_path / name)
    expected = _draw(load_pipeline(str(tmp_path / name)))
    make_portable(tmp_path / name)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / name, safety_checker=None)
    assert _dtypes(stock) == {torch.float32}
    assert torch.equal(_draw(stock), expected)


def test_shards_of_a_variant_become_plain_ones(tiny_backbone, tmp_path) -> None:
    shutil.copytree(tiny_backbone, tmp_path / "sharded")
    expected = load_pipeline(str(tiny_backbone))
    part = tmp_path / "sharded" / "unet"
    shutil.rmtree(part)
    expected.unet.save_pretrained(part, variant="fp16", max_shard_size="100KB")
    assert len(list(part.glob("*.safetensors"))) > 1
    assert weights_variant(part) == "fp16"
    make_portable(tmp_path / "sharded")
    assert weights_variant(part) is None
    found = load_pipeline(str(tmp_path / "sharded")).unet.state_dict()
    assert all(torch.equal(found[n], value) for n, value in expected.unet.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_written_is_stored_in_one_dtype_and_loaded_in_one(
    dtype, tiny_backbone, tmp_path
) -> None:
    save_pipeline(load_pipeline(str(tiny_backbone), _weights(dtype)), tmp_path / "saved")
    assert _dtypes(StableDiffusionPipeline.from_pretrained(tmp_path / "saved")) == {torch.float32}
    stored = {
        kind
        for path in (tmp_path / "saved").glob("*/*.safetensors")
        for kind in _stored_dtypes(path.read_bytes())
    }
    assert stored == {"F32" if dtype == torch.float32 else "F16"}


def _stored_dtypes(content: bytes) -> set[str]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {value["dtype"] for name, value in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("name", ["waterbirds", "celeba", "fairface"])
def test_the_shipped_backbones_are_drawn_from_by_a_plain_call_of_diffusers(name: str) -> None:
    ours = load_pipeline(f"asset:{name}")
    stock = StableDiffusionPipeline.from_pretrained(resolve_backbone(f"asset:{name}"))
    assert _dtypes(stock) == {torch.float32}
    assert torch.equal(_draw(stock), _draw(ours))
