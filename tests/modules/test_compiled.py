"""A compiled denoiser: the same results up to rounding, in scoring, training and sampling."""

import json
from pathlib import Path

import pytest
import torch
from birds_data import birds_data
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from trainers import quiet_trainer

from invdiff_pl.data.images import read_images
from invdiff_pl.errors import InvDiffError
from invdiff_pl.modules import ConditionalSampler, EnvironmentInference, InvariantAdapter
from invdiff_pl.modules.common import compile_in_place
from invdiff_pl.samples import read_manifest


@pytest.mark.slow
def test_losses_adapter_and_images_are_those_of_the_denoiser_that_is_not_compiled(
    birds: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    losses, updates, images = [], [], []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        scored = folder / "environments"
        module = EnvironmentInference(
            str(tiny_backbone), str(scored), timesteps=1, noise_draws=2, compile_denoiser=compiled
        )
        data = birds_data(birds, tiny_backbone, tmp_path / "cache")
        quiet_trainer(scored).predict(module, datamodule=data, return_predictions=False)
        losses.append(load_file(scored / "environments.safetensors")["null_losses"])

        count = len(losses[0])
        groups = tmp_path / "groups"
        groups.mkdir(exist_ok=True)
        save_file({"assignments": torch.arange(count) % 2}, groups / "environments.safetensors")
        (groups / "environments.json").write_text(json.dumps({}))
        adapter = InvariantAdapter(
            str(tiny_backbone), str(folder), learning_rate=0.01, compile_denoiser=compiled
        )
        data = birds_data(birds, tiny_backbone, tmp_path / "cache", environments=str(groups))
        checkpoint = ModelCheckpoint(folder / "checkpoints", filename="last", every_n_train_steps=2)
        trainer = quiet_trainer(
            folder, max_steps=2, enable_checkpointing=True, callbacks=[checkpoint]
        )
        trainer.fit(adapter, datamodule=data)
        updates.append(load_file(folder / "adapter" / "pytorch_lora_weights.safetensors"))

        drawn = folder / "samples"
        sampler = ConditionalSampler(
            str(tiny_backbone),
            str(drawn),
            adapter=str(folder / "adapter"),
            steps=2,
            compile_denoiser=compiled,
        )
        data = birds_data(
            birds, tiny_backbone, tmp_path / "cache", content="prompts", samples_per_prompt=2
        )
        quiet_trainer(drawn).predict(sampler, datamodule=data, return_predictions=False)
        rows = read_manifest(drawn)
        images.append(read_images([drawn / row.file for row in rows], 32).int())
        assert (module.unet._compiled_call_impl is not None) == compiled
        assert (adapter.denoiser._compiled_call_impl is not None) == compiled
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert updates[0].keys() == updates[1].keys()
    for name, value in updates[0].items():
        torch.testing.assert_close(updates[1][name], value, rtol=1e-2, atol=1e-4)
    assert (images[1] - images[0]).abs().max() <= 2
    states = [torch.load(tmp_path / kind / "checkpoints" / "last.ckpt", weights_only=True)
              for kind in ("False", "True")]  # fmt: skip
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()


def test_compiling_for_the_cpu_without_a_compiler_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InvDiffError, match=r"needs a C\+\+ compiler, and g\+\+ is not there"):
        compile_in_place(torch.nn.Linear(1, 1), torch.device("cpu"))
