from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import disturb
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import FAMILIES, PROMPTS, made
from torch import Tensor

from invdiff_pl.adapters import Adapter, build_adapter, load_adapter
from invdiff_pl.adapters.forms import write_form
from invdiff_pl.adapters.lora import WEIGHTS_FILE
from invdiff_pl.adapters.pipeline import InvDiffPipeline
from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.backbones.check import absent_parts
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.utils.errors import InvDiffError


def drawn(pipe: Any) -> Tensor:
    denoiser = frozen_denoiser(pipe, 32)
    rows = denoiser.condition([PROMPTS[0], ""])
    first, null = ({name: value[[n]] for name, value in rows.items()} for n in (0, 1))
    return denoiser.draw(
        first, null, *denoiser.initial_noise([0], seed=0), steps=2, guidance_scale=3.0
    )


def adapted(name: str) -> tuple[Any, Adapter]:
    pipe = made(name)
    return pipe, build_adapter("lora", frozen_denoiser(pipe).network, rank=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_untrained_lora_changes_nothing(name: str) -> None:
    plain = drawn(made(name))
    pipe, adapter = adapted(name)
    assert torch.equal(drawn(pipe), plain)
    disturb(adapter)
    assert not torch.allclose(drawn(pipe), plain, atol=1e-4)
    adapter.set_scale(0.0)
    assert torch.equal(drawn(pipe), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_pipelines_load_a_trained_lora_and_draw_the_same(name: str, tmp_path: Path) -> None:
    pipe, adapter = adapted(name)
    disturb(adapter)
    expected = drawn(pipe)
    adapter.save(tmp_path / "lora")
    stock = made(name)
    if name == "pixart":  # whose pipeline loads no LoRAs
        trained = TrainedAdapter(tmp_path / "lora")
        trained.save(tmp_path / "peft", form="peft")
        stock.transformer = PeftModel.from_pretrained(stock.transformer, str(tmp_path / "peft"))
    else:
        stock.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(drawn(stock), expected, atol=1e-5, rtol=0)
    again = made(name)
    load_adapter(tmp_path / "lora", frozen_denoiser(again).network)
    torch.testing.assert_close(drawn(again), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_weights_draw_the_same_and_are_put_back(name: str) -> None:
    pipe, adapter = adapted(name)
    disturb(adapter)
    expected = drawn(pipe)
    before = {n: value.clone() for n, value in adapter.frozen_weights().items()}
    adapter.prepare_sampling(pipe, 1.0)
    torch.testing.assert_close(drawn(pipe), expected, atol=1e-4, rtol=0)
    adapter.prepare_sampling(pipe, 0.0)
    torch.testing.assert_close(drawn(pipe), drawn(made(name)), atol=0, rtol=0)
    after = adapter.frozen_weights()
    assert all(torch.equal(after[n], value) for n, value in before.items())


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_the_kohya_form_comes_back_through_diffusers_own_converter(
    name: str, tmp_path: Path
) -> None:
    pipe, adapter = adapted(name)
    disturb(adapter)
    expected = drawn(pipe)
    adapter.save(tmp_path / "lora", architecture="some-model")
    TrainedAdapter(tmp_path / "lora").save(tmp_path / "kohya", form="kohya")
    stock = made(name)
    stock.load_lora_weights(str(tmp_path / "kohya"), weight_name="lora.safetensors")
    torch.testing.assert_close(drawn(stock), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kohya_form_names_layers_and_tells_alpha_of_each(name: str, tmp_path: Path) -> None:
    _, adapter = adapted(name)
    adapter.save(tmp_path / "lora")
    file = write_form(tmp_path / "lora" / WEIGHTS_FILE, "kohya", tmp_path, "some-model")
    state, original = load_file(file), load_file(tmp_path / "lora" / WEIGHTS_FILE)
    part = "unet" if name in ("sd", "sdxl") else "transformer"
    layers = {key.split(".")[0] for key in state}
    assert len(layers) == len(original) / 2
    assert all(layer.startswith(f"lora_{part}_") for layer in layers)
    for layer in layers:
        assert float(state[f"{layer}.alpha"]) == len(state[f"{layer}.lora_down.weight"]) == 2
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    assert told["ss_network_dim"] == "2"
    assert told["ss_network_alpha"] == "2.0"
    assert told["modelspec.architecture"] == "some-model/lora"


def test_other_forms_are_of_loras_only(tmp_path: Path) -> None:
    adapter = build_adapter("small_unet", made("sd").unet, ratio=0.5)
    adapter.save(tmp_path / "small")
    trained = TrainedAdapter(tmp_path / "small")
    with pytest.raises(InvDiffError, match="form='kohya': a small_unet is not a LoRA"):
        trained.save(tmp_path / "out", form="kohya")
    with pytest.raises(InvDiffError, match="form=comfy"):
        trained.save(tmp_path / "out", form="comfy")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux", "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2 proj_mlp"),
        ("flux2", "ff.linear_in ff.linear_out ff_context.linear_in ff_context.linear_out"),
        ("lumina2", "feed_forward.linear_1 feed_forward.linear_2 feed_forward.linear_3"),
        ("zimage", "feed_forward.w1 feed_forward.w2 feed_forward.w3"),
    ],
)
def test_feed_forward_layers_of_a_transformer_are_adapted_by_name(name: str, expected: str) -> None:
    adapter = build_adapter("lora", made(name).transformer, layers=["feed_forward"])
    layers = {name.split(".lora_")[0].split(".", 2)[2] for name in adapter.parameters()}
    assert sorted(layers) == expected.split()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sd"])
def test_a_pipeline_of_another_family_takes_an_invariant_scale(name: str, tmp_path: Path) -> None:
    trained, adapter = adapted(name)
    disturb(adapter)
    adapter.save(tmp_path / "lora")
    expected, plain = drawn(trained), drawn(made(name))
    pipe = InvDiffPipeline.from_pipe(made(name), lora=tmp_path / "lora")
    assert type(pipe).__name__ == f"InvDiff{type(made(name)).__name__}"
    torch.testing.assert_close(drawn(pipe), expected, atol=1e-6, rtol=0)
    denoiser, call = frozen_denoiser(pipe, 32), type(pipe).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(pipe), "__call__", lambda self, **kw: call(self, invariant_scale=0.0, **kw)
        )
        torch.testing.assert_close(drawn(pipe), plain, atol=1e-6, rtol=0)
    pipe.save_pretrained(tmp_path / "both")
    again = InvDiffPipeline.from_pretrained(tmp_path / "both")
    torch.testing.assert_close(drawn(again), expected, atol=1e-5, rtol=0)
    absent = dict.fromkeys(absent_parts(str(tmp_path / "both"))) if name == "sd3" else {}
    stock = denoiser.stock.from_pretrained(tmp_path / "both", **absent)
    stock.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(stock), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_updates_beside_half_precision_weights_are_trained_in_single(name: str) -> None:
    pipe = made(name).to(torch.bfloat16)
    denoiser = frozen_denoiser(pipe, 32)
    adapter = build_adapter("lora", denoiser.network, rank=2)
    adapter.prepare_training()
    disturb(adapter)
    noise = denoiser.initial_noise([0], seed=0)[0]
    predicted = denoiser.predict(noise, torch.tensor([500]), denoiser.condition(PROMPTS[:1]))
    predicted.float().square().mean().backward()
    assert denoiser.network.dtype == predicted.dtype == torch.bfloat16
    found = adapter.parameters().values()
    assert {value.dtype for value in found} == {torch.float32}
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in found)
