"""The published architecture: sizes and operations counted by others; folders of its form."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from invdiff_pl.adapters import build_adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.noising import predict
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.backbones.stable_diffusion import (
    random_stable_diffusion,
    stable_diffusion_text_encoder,
    stable_diffusion_unet,
    stable_diffusion_vae,
)
from invdiff_pl.callbacks.resource_estimate import activations


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (stable_diffusion_unet, 859_520_964),
        (stable_diffusion_vae, 83_653_863),
        (stable_diffusion_text_encoder, 123_060_480),
    ],
)
def test_parts_have_the_published_number_of_parameters(build, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(value.numel() for value in build().parameters()) == parameters


def test_a_forward_pass_of_the_unet_takes_0_80_tflop_an_image_at_64_x_64_latents() -> None:
    with torch.device("meta"):
        unet = stable_diffusion_unet()
        given = torch.empty(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.empty(1, 77, 768)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*given)
    # Multiplications and additions counted apart.
    assert counter.get_total_flops() == pytest.approx(0.80e12, rel=0.01)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the published ones of 1.x are, with a tenth of the channels.

    Its autoencoder names its attention's layers as diffusers did then, its text encoder has the
    prefix of then, and it lists a safety checker and a feature extractor whose class is gone.
    """
    folder = tmp_path_factory.mktemp("published") / "pipeline"
    random_stable_diffusion(["a photo of a bird"], seed=0, thinner=10).save_pretrained(folder)
    _rename(
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
    )
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    old = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in weights.items()}
    save_file(old, file, {"format": "pt"})
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _rename(file: Path, names: dict[str, str]) -> None:
    weights = load_file(file)
    for new, old in names.items():
        weights = {
            name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value
            for name, value in weights.items()
        }
    save_file(weights, file, {"format": "pt"})


def test_a_folder_of_the_published_form_loads_with_all_of_its_weights(published: Path) -> None:
    loaded = load_pipeline(str(published))
    made = random_stable_diffusion(["a photo of a bird"], seed=0, thinner=10)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, part).state_dict(), getattr(made, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert frozen_denoiser(loaded).condition(["a photo of a bird", ""])["prompt_embeds"].shape == (
        2,
        77,
        72,
    )
    assert type(loaded.scheduler).__name__ == "PNDMScheduler"


class _NoMatrix(torch.autograd.Function):
    """Shapes of an attention that keeps no matrix of tokens by tokens, as GPUs compute it."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "recomputed", "gib"),
    [
        ("lora", {"rank": 16}, False, 57.3),
        ("lora", {"rank": 16}, True, 14.9),
        ("small_unet", {}, False, 13.0),
    ],
)
def test_activations_of_64_samples_counted_on_shapes_are_those_of_the_docs(
    kind: str, settings: dict, recomputed: bool, gib: float, monkeypatch
) -> None:
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **unused: _NoMatrix.apply(query, key, value),
    )
    with torch.device("meta"):
        unet = stable_diffusion_unet().to(torch.bfloat16).requires_grad_(False)
        adapter = build_adapter(kind, unet, **settings)
        trained = list(adapter.parameters().values())
        for value in trained:
            value.data = value.data.to(torch.bfloat16)
        if recomputed:
            adapter.enable_gradient_checkpointing()

        def run(count: int) -> None:
            given = torch.empty(count, 4, 64, 64), torch.zeros(count, dtype=torch.long)
            prediction = predict(adapter.denoiser, *given, torch.empty(count, 77, 768))
            torch.autograd.grad(prediction.float().square().mean(), trained, allow_unused=True)

        counted = activations(run, 64)
    assert counted == pytest.approx(gib * 2**30, rel=0.01)
