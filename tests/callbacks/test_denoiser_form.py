"""Other forms of the denoiser: the same results up to rounding, in scoring, training, sampling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from birds_data import birds_data
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from trainers import adapter_trainer, draw_samples, infer, quiet_trainer

from invdiff_pl.callbacks import DenoiserForm
from invdiff_pl.data.images import read_images
from invdiff_pl.data.samples import read_manifest
from invdiff_pl.modules import ConditionalSampler, EnvironmentInference, InvariantAdapter
from invdiff_pl.utils.errors import InvDiffError


def _run(birds: Path, backbone: Path, folder: Path, form: DenoiserForm) -> dict[str, Any]:
    """Features, an adapter trained for two steps, and samples, with the denoiser in a form."""
    cache = folder / "cache"
    scored = folder / "environments"
    data = birds_data(birds, backbone, cache)
    module = infer(backbone, scored, data, callbacks=[form])
    kernel = module.frozen.network.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == form.channels_last
    found = module.features.float()

    groups = folder / "groups"
    groups.mkdir()
    save_file({"assignments": torch.arange(len(found)) % 2}, groups / "environments.safetensors")
    (groups / "environments.json").write_text(json.dumps({}))
    adapter = InvariantAdapter(str(backbone), learning_rate=0.01)
    data = birds_data(birds, backbone, cache, environments=str(groups))
    checkpoint = ModelCheckpoint(folder / "checkpoints", filename="last", every_n_train_steps=2)
    callbacks = [form, checkpoint]
    trainer = adapter_trainer(folder, max_steps=2, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(adapter, datamodule=data)

    drawn = folder / "samples"
    trained = str(folder / "adapter")
    sampler = ConditionalSampler(str(backbone), adapter=trained, steps=2)
    data = birds_data(birds, backbone, cache, content="prompts", samples_per_prompt=2)
    draw_samples(sampler, data, drawn, callbacks=[form])
    return {
        "denoisers": (module.denoiser, adapter.denoiser, sampler.denoiser),
        "features": found,
        "updates": load_file(folder / "adapter" / "pytorch_lora_weights.safetensors"),
        "images": read_images([drawn / row.file for row in read_manifest(drawn)], 32).int(),
        "names": torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"],
    }


@pytest.mark.parametrize(
    "settings",
    [{"channels_last": True}, pytest.param({"compiled": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_features_adapter_and_images_are_those_of_the_plain_denoiser(
    birds: Path, tiny_backbone: Path, tmp_path: Path, settings: dict[str, bool]
) -> None:
    plain = _run(birds, tiny_backbone, tmp_path / "plain", DenoiserForm())
    other = _run(birds, tiny_backbone, tmp_path / "other", DenoiserForm(**settings))
    for run, form in ((plain, DenoiserForm()), (other, DenoiserForm(**settings))):
        for denoiser in run["denoisers"]:
            assert (denoiser._compiled_call_impl is not None) == form.compiled
    torch.testing.assert_close(other["features"], plain["features"], rtol=2e-3, atol=1e-3)
    assert other["updates"].keys() == plain["updates"].keys()
    for name, value in plain["updates"].items():
        torch.testing.assert_close(other["updates"][name], value, rtol=1e-2, atol=1e-4)
    assert (other["images"] - plain["images"]).abs().max() <= 2
    assert other["names"].keys() == plain["names"].keys()


def test_compiling_for_the_cpu_without_a_compiler_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_backbone: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    module = EnvironmentInference(str(tiny_backbone))
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(InvDiffError, match=r"needs a C\+\+ compiler, and g\+\+ is not there"):
        DenoiserForm(compiled=True).setup(trainer, module, "predict")
