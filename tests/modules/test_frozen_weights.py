"""How weights that are not trained are held: half precision, and eight or four bits."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import FluxPipeline
from pytorch_lightning import Callback
from tiny_families import FAMILIES, PROMPTS, made
from torch import Tensor
from torch.utils.data import DataLoader
from trainers import quiet_trainer

import invdiff_pl as inv
from invdiff_pl.adapters import build_adapter
from invdiff_pl.backbones import pipeline
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import load_autoencoder, load_pipeline
from invdiff_pl.backbones.quantized import is_quantized, quantize, weight_count
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.modules import ConditionalSampler, EnvironmentInference, InvariantAdapter
from invdiff_pl.utils import names
from invdiff_pl.utils.errors import InvDiffError

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
HELD = ["bfloat16", *(pytest.param(name, marks=needs_bitsandbytes) for name in ("int8", "nf4"))]


def predicted(pipe: Any) -> Tensor:
    denoiser = frozen_denoiser(pipe, 32)
    noise, _ = denoiser.initial_noise([0, 1], seed=0)
    timesteps = torch.tensor([400, 800])
    return denoiser.predict(noise, timesteps, denoiser.condition(PROMPTS)).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 with few random weights."""
    path = tmp_path_factory.mktemp("flux") / "pipeline"
    made("flux").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("setting", "known"), [("frozen_weights", "nf4"), ("optimizer", "adamw8bit")]
)
def test_what_needs_a_library_that_is_missing_is_refused_in_one_sentence(
    setting: str, known: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    told = rf"{setting}={known}: bitsandbytes is not installed: `pip install bitsandbytes`, or "
    with pytest.raises(InvDiffError, match=f"--scale.{told}"):
        names.require_names({"scale": {setting: known}})
    with pytest.raises(InvDiffError, match=told):
        InvariantAdapter(str(folder), **{setting: known})  # type: ignore[arg-type]


def test_wrong_names_are_refused(folder: Path) -> None:
    with pytest.raises(InvDiffError, match="frozen_weights=int3: expected one of float32, bfloat"):
        load_pipeline(str(folder), "int3")
    with pytest.raises(InvDiffError, match="frozen_weights=int8: only a LoRA is trained beside"):
        InvariantAdapter(str(folder), "small_unet", frozen_weights="int8")


def test_text_encoders_are_loaded_when_a_prompt_is_met_that_nobody_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []
    load = FluxPipeline.from_pretrained

    def note(*given: Any, **settings: Any) -> Any:
        loaded.append(settings)
        return load(*given, **settings)

    monkeypatch.setattr(FluxPipeline, "from_pretrained", note)
    module = EnvironmentInference(str(folder))
    assert [module.pipeline.text_encoder, module.pipeline.text_encoder_2] == [None, None]
    assert len(loaded) == 1
    rows: Any = [{"latents": torch.zeros(4, 16, 16), "prompt": text} for text in PROMPTS * 4]
    quiet_trainer(folder.parent).predict(module, DataLoader(rows, batch_size=4))
    assert len(loaded) == 2  # once, and without the denoiser
    assert loaded[1]["transformer"] is None
    expected = frozen_denoiser(made("flux"), 32).condition([*PROMPTS, ""])
    for name, value in module.conditions.rows().items():
        torch.testing.assert_close(value, expected[name])


def test_the_data_module_holds_text_encoders_as_it_is_told_and_the_vae_in_single_precision(
    five: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def note(backbone: str, weights: str = "float32", **parts: bool) -> Any:
        seen.append(weights)
        return pipeline.load_pipeline(backbone, weights, **parts)

    monkeypatch.setattr("invdiff_pl.data.base.load_pipeline", note)
    shared: dict[str, Any] = {"backbone": str(folder), "resolution": 32}
    cache = tmp_path / "cache"
    for weights in ("float32", "bfloat16", "nf4", "bfloat16"):
        data = WaterbirdsDataModule(
            root=str(five), cache_dir=str(cache), frozen_weights=weights, **shared
        )
        assert data.conditions().rows()["prompt_embeds"].dtype == torch.float32
    assert seen == ["float32", "bfloat16"]  # what bfloat16 gave is read for nf4, too
    assert len(list((cache / "prompts").glob("*.safetensors"))) == 2
    assert {value.dtype for value in load_autoencoder(str(folder)).parameters()} == {torch.float32}


@needs_bitsandbytes
@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_are_rounded_and_a_lora_beside_them_is_trained(
    name: str, weights: str
) -> None:
    pipe = made(name).to(torch.bfloat16)
    network = frozen_denoiser(pipe).network
    before, count = predicted(pipe), sum(value.numel() for value in network.parameters())
    size = sum(value.nbytes for value in network.parameters())
    assert not is_quantized(network)
    quantize(network, weights)
    network.eval()
    assert is_quantized(network)
    assert network.dtype == torch.bfloat16
    assert sum(value.nbytes for value in network.parameters()) < size
    assert sum(weight_count(value) for value in network.parameters()) == count
    after = predicted(pipe)
    error = float((after - before).norm() / before.norm())
    assert 0 < error < {"int8": 0.05, "nf4": 0.3}[weights]
    adapter = build_adapter("lora", network, rank=2)
    adapter.prepare_training()
    assert adapter.backbone_size == count
    assert torch.equal(predicted(pipe), after)
    with torch.enable_grad():
        predicted(pipe).square().mean().backward()
    found = adapter.parameters()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert any(bool(value.grad.any()) for value in found.values() if value.grad is not None)
    with torch.no_grad():
        for key, value in found.items():
            if "lora_B" in key:
                value.fill_(0.05)
    changed = predicted(pipe)
    assert not torch.equal(changed, after)
    adapter.prepare_sampling(pipe, 1.0)  # without folding, which would round the updates away
    torch.testing.assert_close(predicted(pipe), changed)
    adapter.prepare_sampling(pipe, 0.0)
    assert torch.equal(predicted(pipe), after)


class _Kept(Callback):
    """Remembers what the optimizer holds."""

    def on_train_batch_end(self, trainer: pl.Trainer, *given: Any) -> None:
        states = trainer.optimizers[0].state.values()
        self.kinds = {
            value.dtype for state in states for value in state.values() if torch.is_tensor(value)
        }


@pytest.mark.parametrize("weights", HELD)
def test_an_adapter_is_trained_and_drawn_beside_weights_held_so(
    weights: str, folder: Path, tmp_path: Path
) -> None:
    images = inv.PromptedImages(torch.rand(16, 3, 32, 32), PROMPTS * 8)
    data = inv.LatentsInMemory.from_images(
        made("flux"), images, torch.arange(16) // 2 % 2, resolution=32, progress=False, batch_size=8
    )
    module = InvariantAdapter(
        str(folder), learning_rate=0.01, warmup_steps=1, resolution=32, frozen_weights=weights
    )
    start = {name: p.detach().clone() for name, p in module.trainable_parameters().items()}
    saving = inv.callbacks.SaveAdapter(str(tmp_path))
    quiet_trainer(tmp_path, max_steps=2, callbacks=[saving]).fit(module, datamodule=data)
    moved = module.trainable_parameters()
    assert any(not torch.equal(value, start[name]) for name, value in moved.items())
    sampler = ConditionalSampler(
        str(folder),
        str(tmp_path / "adapter"),
        PROMPTS,
        steps=1,
        resolution=32,
        frozen_weights=weights,
    )
    rows: Any = [{"prompt": text} for text in PROMPTS]
    drawn: Any = quiet_trainer(tmp_path).predict(sampler, DataLoader(rows, batch_size=2))
    (batch,) = drawn
    assert {scale: tuple(each.shape) for scale, each in batch["images"].items()} == {
        0.0: (2, 3, 32, 32),
        1.0: (2, 3, 32, 32),
    }


@needs_bitsandbytes
def test_moments_of_large_matrices_take_a_byte_each_and_a_resumed_run_is_the_same(
    tmp_path: Path,
) -> None:
    images = inv.PromptedImages(torch.rand(16, 3, 32, 32), PROMPTS * 8)
    groups = torch.arange(16) // 2 % 2

    def train(steps: int, name: str, ckpt_path: str | None = None) -> dict[str, Tensor]:
        data = inv.LatentsInMemory.from_images(
            made("sd3"), images, groups, resolution=32, progress=False, batch_size=8
        )
        settings: dict[str, Any] = {"learning_rate": 0.01, "warmup_steps": 1, "resolution": 32}
        module = InvariantAdapter(
            made("sd3"), adapter_settings={"rank": 300}, optimizer="adamw8bit", **settings
        )
        kept = _Kept()
        saving = pl.callbacks.ModelCheckpoint(
            tmp_path / name, filename="step", every_n_train_steps=1
        )
        trainer = quiet_trainer(
            tmp_path, max_steps=steps, callbacks=[kept, saving], enable_checkpointing=True
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        assert torch.uint8 in kept.kinds
        return {n: p.detach().clone() for n, p in module.trainable_parameters().items()}

    whole = train(3, "whole")
    train(1, "first")
    # The schedule ends where the trainer does, so the first step alone is the same at any length.
    resumed = train(3, "resumed", str(tmp_path / "first" / "step.ckpt"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
