"""What large backbones need: frozen weights in half precision, LoRA, local batches, plans."""

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from trainers import quiet_trainer

from invdiff_pl.adapters import build_adapter, load_adapter
from invdiff_pl.backbones.noising import predict
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.callbacks import (
    MaxMicroBatch,
    SampleGrid,
    SaveAdapter,
    SavePipeline,
)
from invdiff_pl.callbacks.max_micro_batch import micro_batches
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.modules import Backbone, InvariantAdapter
from invdiff_pl.utils.errors import InvDiffError


class _Watch(pl.Callback):
    """Looks at the modules as the first step meets them."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        trained = {id(value) for value in pl_module.trainable_parameters().values()}
        named = dict(pl_module.named_parameters())
        self.frozen = {value.dtype for value in named.values() if id(value) not in trained}
        self.trained = {value.dtype for value in named.values() if id(value) in trained}
        self.modes = {part.training for part in pl_module.adapter.network.modules()}
        self.row = batch["row"]


@pytest.mark.parametrize("kind", ["lora", "small_unet"])
def test_under_mixed_precision_frozen_weights_are_half_and_trained_ones_whole(
    kind: str, module_of, tiny_backbone, environments, tmp_path
) -> None:
    settings = {"ratio": 0.5} if kind == "small_unet" else {}
    module = InvariantAdapter(str(tiny_backbone), kind, settings, learning_rate=0.01)
    data, watch = module_of(environments=str(environments), batch_size=8), _Watch()
    callbacks = [watch, SaveAdapter(str(tmp_path))]
    trainer = quiet_trainer(tmp_path, max_steps=2, precision="bf16-mixed", callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    assert (watch.frozen, watch.trained) == ({torch.bfloat16}, {torch.float32})
    assert {value.dtype for value in module.pipeline.vae.parameters()} == {torch.bfloat16}
    if kind == "small_unet":
        assert watch.modes == {False}
    assert watch.row.device.type == "cpu"
    unet = load_pipeline(str(tiny_backbone)).unet
    loaded = load_adapter(tmp_path / "adapter", unet)
    assert {value.dtype for value in loaded.parameters().values()} == {torch.float32}


def test_a_branch_beside_the_frozen_denoiser_keeps_none_of_its_activations(tiny_backbone) -> None:
    adapter = build_adapter("small_unet", load_pipeline(str(tiny_backbone)).unet, ratio=0.5)
    seen = []
    adapter.network.register_forward_hook(lambda network, given, result: seen.append(result[0]))
    noisy = torch.zeros(1, 4, 16, 16)
    prediction = predict(adapter.denoiser, noisy, torch.tensor([5]), torch.zeros(1, 16, 16))
    assert prediction.requires_grad
    assert not seen[0].requires_grad


def test_pictures_are_drawn_during_training_in_half_precision(
    module_of, tiny_backbone, environments, tmp_path
) -> None:
    from pytorch_lightning.loggers import TensorBoardLogger

    module = InvariantAdapter(str(tiny_backbone))
    data = module_of(environments=str(environments), batch_size=8)
    grid = SampleGrid(every_n_steps=2, columns=3, prompts=2, steps=1, batch_size=4)
    trainer = quiet_trainer(
        tmp_path,
        precision="bf16-mixed",
        callbacks=[grid],
        max_steps=1,
    )
    trainer.logger = TensorBoardLogger(str(tmp_path), name="", version="")
    trainer.fit(module, datamodule=data)
    assert list(tmp_path.glob("events.*"))


class _Broadcasts(pl.Callback):
    """Writes what DDP would send from one rank to another."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer, pl_module) -> None:
        ddp = trainer.strategy.model
        named = [*ddp.module.named_parameters(), *ddp.module.named_buffers()]
        sent = [name for name, _ in named if name not in ddp.parameters_to_ignore]
        trained = {id(value) for value in pl_module.trainable_parameters().values()}
        names = [name for name, value in pl_module.named_parameters() if id(value) in trained]
        if trainer.is_global_zero:
            buffers = [name for name, _ in ddp.module.named_buffers()]
            self.file.write_text(json.dumps([sorted(sent), sorted(names), buffers]))


def test_ddp_sends_trained_parameters_only(
    module_of, tiny_backbone, environments, tmp_path
) -> None:
    module = InvariantAdapter(str(tiny_backbone))
    data = module_of(environments=str(environments), batch_size=8)
    watch = _Broadcasts(tmp_path / "sent.json")
    trainer = quiet_trainer(tmp_path, ranks=2, callbacks=[watch], max_steps=1)
    trainer.fit(module, datamodule=data)
    sent, trained, buffers = json.loads(watch.file.read_text())
    assert sent == trained
    assert "conditions.prompt_embeds" in buffers


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_low_rank_fine_tuning_writes_a_folder_that_stock_diffusers_loads(
    precision: str, module_of, tiny_backbone, tmp_path
) -> None:
    module = Backbone(
        str(tiny_backbone),
        learning_rate=0.01,
        warmup_steps=1,
        lora_rank=2,
        gradient_checkpointing=True,
    )
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=0)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=2,
        precision=precision,
        callbacks=[SavePipeline(str(tmp_path)), checkpoints],
        enable_checkpointing=True,
    )
    trainer.fit(module, datamodule=module_of(batch_size=8))
    names = set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert names == {f"denoiser.{name}" for name in module.trainable_parameters()}

    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    start = load_pipeline(str(tiny_backbone))
    # Weights of before, plus what peft itself makes of the updates.
    reference = load_pipeline(str(tiny_backbone)).unet
    fused = build_adapter("lora", reference, rank=2)
    for name, value in module.trainable_parameters().items():
        fused.parameters()[name].data.copy_(value)
    fused.prepare_sampling(start, 1.0)
    noisy, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([3, 700])
    embeddings = torch.randn(2, 16, 16)
    with torch.no_grad():
        ours = stock.unet(noisy, timesteps, embeddings).sample
        theirs = reference(noisy, timesteps, embeddings).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    before = load_file(tiny_backbone / "unet" / "diffusion_pytorch_model.safetensors")
    after = stock.unet.state_dict()
    assert not torch.equal(
        after["time_embedding.linear_1.weight"], before["time_embedding.linear_1.weight"]
    )
    assert torch.equal(after["conv_in.weight"], before["conv_in.weight"])
    assert isinstance(stock.unet, UNet2DConditionModel)


def test_local_batches_are_as_large_as_allowed_on_any_number_of_devices() -> None:
    assert [micro_batches(64, devices, 16) for devices in (1, 2, 3, 4, 8)] == [4, 2, 2, 1, 1]
    assert micro_batches(48, 1, 48) == 1
    with pytest.raises(InvDiffError, match="size=0"):
        MaxMicroBatch(0)


class _Gradients(pl.Callback):
    """Keeps each step's gradients; stops after a step, whatever the schedule."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.kept: dict[int, list[torch.Tensor]] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        values = pl_module.trainable_parameters().values()
        self.kept[trainer.global_step] = [value.grad.clone() for value in values]

    def on_train_batch_end(self, trainer, *unused) -> None:
        trainer.should_stop = trainer.global_step == self.last


def test_a_run_resumed_at_another_local_batch_goes_on_with_the_same_gradients(
    module_of, tiny_backbone, environments, tmp_path
) -> None:
    def fit(folder: Path, most: int, last: int, resume: Path | None = None) -> dict:
        # Without a rate the weights stay, so that gradients can be compared.
        module = InvariantAdapter(str(tiny_backbone), learning_rate=0.0, lambda_=5.0)
        data = module_of(environments=str(environments), batch_size=12)
        gradients = _Gradients(last)
        checkpoints = ModelCheckpoint(folder, "step", every_n_train_steps=2, save_top_k=-1)
        trainer = quiet_trainer(
            folder,
            max_steps=4,
            enable_checkpointing=True,
            callbacks=[MaxMicroBatch(most), gradients, checkpoints],
        )
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return gradients.kept

    whole = fit(tmp_path / "whole", 12, 4)
    first = fit(tmp_path / "first", 5, 2)
    second = fit(tmp_path / "second", 6, 4, tmp_path / "first" / "step.ckpt")
    assert (sorted(whole), sorted(first), sorted(second)) == ([0, 1, 2, 3], [0, 1], [2, 3])
    for step, values in {**first, **second}.items():
        assert any(bool(value.any()) for value in values)
        for ours, theirs in zip(values, whole[step], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_prompt_embeddings_are_cached_in_half_precision_by_key(
    module_of, tiny_backbone, tmp_path
) -> None:
    name = "prompt_embeds"
    whole = module_of(cache_dir=str(tmp_path)).conditions().rows()[name]
    half: WaterbirdsDataModule = module_of(cache_dir=str(tmp_path), embedding_dtype="float16")
    computed, read = (half.conditions().rows()[name] for _ in range(2))
    files = {path.stat().st_size: path for path in (tmp_path / "prompts").glob("*.safetensors")}
    dtypes = [load_file(files[size])[name].dtype for size in sorted(files)]
    assert dtypes == [torch.float16, torch.float32]
    assert computed.dtype == read.dtype == torch.float32
    assert torch.equal(computed, whole.half().float())
    assert torch.equal(computed, read)


@pytest.mark.parametrize("latent_device", ["memory", "device", "auto"])
def test_batches_do_not_depend_on_where_latents_are_held(
    latent_device: str, module_of, environments
) -> None:
    rows = torch.tensor([3, 0, 3, 9])
    read = module_of(environments=str(environments)).training_latents(rows)
    held = module_of(environments=str(environments), latent_device=latent_device)
    batch = held.training_latents(rows)
    assert batch.keys() == read.keys()
    assert all(
        torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value))
        for name, value in read.items()
    )
    assert held.moments() is held.moments()
