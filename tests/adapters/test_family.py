"""What every kind of adapter keeps to: no-op at first, scale, files, bf16, checkpointing."""

from typing import Any

import pytest
import torch
from adapter_cases import disturb, draw_images, frozen_unet, inputs
from torch import Tensor

from invdiff_pl.adapters import Adapter, build_adapter, load_adapter
from invdiff_pl.backbones.noising import predict
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.cli.experiment import experiment_of
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.workflow.stages import STAGES

# The test backbone is so small that the smallest UNet is a good part of it.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "small_unet": {"ratio": 0.5},
    "bottleneck": {"ratio": 0.2},
    "unet_copy": {"ratio": 0.25},
}
KINDS = list(SETTINGS)


def _build(kind: str, backbone, dtype: torch.dtype = torch.float32) -> Adapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_adapter(kind, frozen_unet(backbone, dtype), **SETTINGS[kind])


@torch.no_grad()
def _frozen(backbone) -> Tensor:
    noisy, timesteps, text = inputs()
    prediction: Tensor = frozen_unet(backbone)(noisy, timesteps, text).sample
    return prediction


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unet_copy"])
def test_an_untrained_adapter_predicts_as_the_backbone_bit_for_bit(kind, tiny_backbone) -> None:
    with torch.no_grad():
        adapter = _build(kind, tiny_backbone)
        assert torch.equal(predict(adapter.denoiser, *inputs()), _frozen(tiny_backbone))


def test_the_references_copy_starts_from_a_shrunken_prediction(tiny_backbone) -> None:
    adapter, frozen = _build("unet_copy", tiny_backbone), _frozen(tiny_backbone)
    with torch.no_grad():
        torch.testing.assert_close(predict(adapter.denoiser, *inputs()), 0.75 * frozen)
        # With its last layer as it was, the copy is the backbone, and so is any blend of the two.
        branch: Any = adapter.denoiser.branch
        branch.conv_out.load_state_dict(adapter.network.conv_out.state_dict())
        torch.testing.assert_close(
            predict(adapter.denoiser, *inputs()), frozen, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_gives_the_backbones_images_exactly_even_after_another(
    kind, tiny_backbone
) -> None:
    pipeline = load_pipeline(str(tiny_backbone))
    expected = draw_images(pipeline)
    adapter = build_adapter(kind, pipeline.unet, **SETTINGS[kind])
    disturb(adapter)
    for scale in (1.0, 0.5):
        adapter.prepare_sampling(pipeline, scale)
        assert not torch.equal(draw_images(pipeline), expected)
    adapter.prepare_sampling(pipeline, 0.0)
    assert torch.equal(draw_images(pipeline), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unet_copy"])
def test_rescaled_it_predicts_at_one_what_it_did_at_the_factor(kind, tiny_backbone) -> None:
    adapter = _build(kind, tiny_backbone)
    disturb(adapter)
    with torch.no_grad():
        adapter.set_scale(1.5)
        expected = predict(adapter.denoiser, *inputs())
        adapter.set_scale(1.0)
        assert not torch.allclose(
            predict(adapter.denoiser, *inputs()), expected, rtol=1e-4, atol=1e-5
        )
        adapter.rescale(1.5)
        torch.testing.assert_close(
            predict(adapter.denoiser, *inputs()), expected, rtol=1e-4, atol=1e-5
        )


def test_the_references_copy_refuses_to_be_rescaled(tiny_backbone) -> None:
    adapter = _build("unet_copy", tiny_backbone)
    assert not adapter.rescalable
    with pytest.raises(InvDiffError, match="blends two models"):
        adapter.rescale(1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_it_predicts_the_same_and_is_afterwards_what_it_was(kind, tiny_backbone) -> None:
    adapter = _build(kind, tiny_backbone)
    disturb(adapter)
    state = {name: value.clone() for name, value in adapter.denoiser.state_dict().items()}
    with torch.no_grad():
        expected = predict(adapter.denoiser, *inputs())
        with adapter.folded():
            folded = predict(adapter.denoiser, *inputs())
        torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(predict(adapter.denoiser, *inputs()), expected)
    after = adapter.denoiser.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    predict(adapter.denoiser, *inputs()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters().values())


def test_lora_is_not_folded_where_half_precision_would_round_it_away(tiny_backbone) -> None:
    adapter = _build("lora", tiny_backbone)
    weights = {n: value.clone() for n, value in adapter.denoiser.state_dict().items()}
    disturb(adapter)
    updates = adapter.parameters()
    with torch.autocast("cpu", torch.bfloat16), adapter.folded():
        state = adapter.denoiser.state_dict()
        assert all(torch.equal(state[n], v) for n, v in weights.items() if n not in updates)
    with adapter.folded():
        state = adapter.denoiser.state_dict()
        assert not all(torch.equal(state[n], v) for n, v in weights.items() if n not in updates)


@pytest.mark.parametrize("kind", ["small_unet", "unet_copy"])
def test_the_prediction_is_linear_in_the_scale(kind, tiny_backbone) -> None:
    adapter, frozen = _build(kind, tiny_backbone), _frozen(tiny_backbone)
    disturb(adapter)
    with torch.no_grad():
        adapter.set_scale(1.0)
        whole = predict(adapter.denoiser, *inputs())
        adapter.set_scale(0.3)
        part = predict(adapter.denoiser, *inputs())
    torch.testing.assert_close(part, frozen + 0.3 * (whole - frozen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_saves_and_loads_bit_for_bit(kind, dtype, tiny_backbone, tmp_path) -> None:
    adapter = _build(kind, tiny_backbone, dtype)
    disturb(adapter)
    adapter.save(tmp_path, trained=True)
    loaded = load_adapter(tmp_path, frozen_unet(tiny_backbone, dtype))
    assert loaded.settings() == adapter.settings()
    saved, read = adapter.parameters(), loaded.parameters()
    assert read.keys() == saved.keys()
    for name, parameter in saved.items():
        assert torch.equal(read[name], parameter), name
    noisy, timesteps, text = inputs()
    given = noisy.to(dtype), timesteps, text.to(dtype)
    with torch.no_grad():
        first, second = predict(adapter.denoiser, *given), predict(loaded.denoiser, *given)
    assert first.dtype == dtype
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_and_bf16_autocast_train_the_same_parameters(
    kind, tiny_backbone
) -> None:
    def gradients(checkpointing: bool, autocast: bool) -> dict[str, Tensor]:
        adapter = _build(kind, tiny_backbone)
        disturb(adapter)
        if checkpointing:
            adapter.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = predict(adapter.denoiser, *inputs())
        prediction.float().square().mean().backward()
        assert all(p.grad is None for n, p in adapter.network.named_parameters() if _is_frozen(n))
        found = {n: p.grad for n, p in adapter.parameters().items() if p.grad is not None}
        assert found.keys() == adapter.parameters().keys()
        return found

    plain = gradients(checkpointing=False, autocast=False)
    for name, gradient in gradients(checkpointing=True, autocast=False).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)
    reduced = gradients(checkpointing=True, autocast=True)
    ours = torch.cat([reduced[name].flatten() for name in plain])
    theirs = torch.cat([plain[name].flatten() for name in plain])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


def _is_frozen(name: str) -> bool:
    return ".invdiff." not in name and "invariant_bottleneck" not in name


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbones_own_weights_can_be_had_back(kind, tiny_backbone) -> None:
    expected = frozen_unet(tiny_backbone).state_dict()
    pipeline = load_pipeline(str(tiny_backbone))
    adapter = build_adapter(kind, pipeline.unet, **SETTINGS[kind])
    disturb(adapter)
    adapter.prepare_sampling(pipeline, 1.0)
    found = adapter.frozen_weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_files_of_another_backbone_and_missing_ones_are_refused(
    kind, tiny_backbone, tmp_path
) -> None:
    adapter = _build(kind, tiny_backbone)
    adapter.save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    weights = file.read_bytes()
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(InvDiffError, match="another backbone"):
        adapter.load_weights(tmp_path)
    file.write_bytes(weights)
    adapter.load_weights(tmp_path)
    file.unlink()
    with pytest.raises(InvDiffError, match="is missing"):
        adapter.load_weights(tmp_path)


def test_the_shipped_settings_stay_below_three_percent_of_the_shipped_backbones() -> None:
    for name in ("waterbirds", "celeba", "fairface"):
        experiment = experiment_of("train", ["--experiment", name])
        chosen = experiment.config(STAGES["adapter"])["model"]["init_args"]
        unet = load_pipeline(f"asset:{name}").unet
        size = sum(parameter.numel() for parameter in unet.parameters())
        adapter = build_adapter(chosen["adapter"], unet, **chosen["adapter_settings"])
        assert adapter.size() <= 0.03 * size


@pytest.mark.parametrize("kind", ["small_unet", "bottleneck"])
@pytest.mark.parametrize("ratio", [0.03, 0.1])
def test_sizes_keep_to_their_ratio_and_come_near_it(kind: str, ratio: float) -> None:
    unet = load_pipeline("asset:waterbirds").unet
    size = sum(parameter.numel() for parameter in unet.parameters())
    share = build_adapter(kind, unet, ratio=ratio).size() / size
    assert 0.6 * ratio < share <= ratio


def test_ratios_that_cannot_be_are_told(tiny_backbone) -> None:
    unet = frozen_unet(tiny_backbone)
    with pytest.raises(InvDiffError, match="the smallest such adapter has"):
        build_adapter("small_unet", unet, ratio=0.001)
    with pytest.raises(InvDiffError, match=r"ratio=1\.5"):
        build_adapter("unet_copy", unet, ratio=1.5)
