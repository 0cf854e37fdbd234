"""What large backbones need: frozen weights in half precision, LoRA, local batches, plans."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from trainers import QUICK

from invdiff_pl.adapters import build_adapter, load_adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.noising import predict
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.callbacks import (
    MaxMicroBatch,
    ResourceEstimate,
    SampleGrid,
    SaveAdapter,
    SavePipeline,
    SaveSamples,
)
from invdiff_pl.callbacks.max_micro_batch import micro_batches
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.modules import Backbone, ConditionalSampler, EnvironmentInference, InvariantAdapter
from invdiff_pl.utils import resources
from invdiff_pl.utils.errors import InvDiffError


def _trainer(folder: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, "max_steps": 2, "enable_checkpointing": False, **settings},
    )


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
    _trainer(tmp_path, precision="bf16-mixed", callbacks=callbacks).fit(module, datamodule=data)
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
    trainer = _trainer(
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
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
    watch = _Broadcasts(tmp_path / "sent.json")
    trainer = _trainer(tmp_path, devices=2, strategy=strategy, callbacks=[watch], max_steps=1)
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
    trainer = _trainer(
        tmp_path,
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
        trainer = _trainer(
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


def test_the_estimate_of_training_counts_what_is_there_and_is_told_first(
    module_of, tiny_backbone, environments, tmp_path, capsys
) -> None:
    module = InvariantAdapter(str(tiny_backbone))
    data = module_of(environments=str(environments), batch_size=12, latent_device="memory")
    callback = ResourceEstimate()
    _trainer(tmp_path, callbacks=[MaxMicroBatch(6), callback]).fit(module, datamodule=data)
    found = callback.parts
    trained = 4 * sum(value.numel() for value in module.trainable_parameters().values())
    assert module.pipeline.text_encoder is None  # the DataModule has told what prompts become
    parts = (module, module.pipeline.vae)
    everything = sum(value.nbytes for part in parts for value in part.parameters())
    assert found["weights, trained"] == found["gradients"] == found["moving average"] == trained
    assert found["optimizer"] == 2 * trained
    assert found["weights, frozen"] == everything - trained
    # Both flips of 2 × 4 moments at 16 × 16 places, float16.
    assert found["cache held"] == len(data.index.rows("train")) * 2 * 8 * 16 * 16 * 2
    assert found["activations of 6 samples"] > 0
    assert capsys.readouterr().out.startswith(f"stage {tmp_path.name} on cpu:")
    assert all(
        value.grad is None or bool(value.grad.isfinite().all())
        for value in module.trainable_parameters().values()
    )


def test_the_estimate_of_a_stage_counts_the_operations_of_all_its_passes(
    module_of, tiny_backbone, environments, tmp_path, capsys
) -> None:
    module = InvariantAdapter(str(tiny_backbone), "small_unet", {"ratio": 0.5})
    text = frozen_denoiser(load_pipeline(str(tiny_backbone))).condition([""])["prompt_embeds"]
    given = torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.int64), text
    with FlopCounterMode(display=False) as counter:
        predict(module.adapter.denoiser, *given).square().mean().backward()
    data = module_of(environments=str(environments), batch_size=12)
    training = ResourceEstimate()
    _trainer(tmp_path, callbacks=[training]).fit(module, datamodule=data)
    assert training.operations == 2 * 12 * counter.get_total_flops() > 0  # two steps

    # Guidance takes two passes a step.
    sampler = ConditionalSampler(str(tiny_backbone), steps=3, guidance_scale=2.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict(sampler.denoiser, *given)
    data = module_of(content="prompts", samples_per_prompt=2, batch_size=4)
    drawing = ResourceEstimate()
    _trainer(tmp_path, callbacks=[drawing]).predict(
        sampler, datamodule=data, return_predictions=False
    )
    drawn = 2 * len(data.prompts)
    assert drawing.operations == 3 * 2 * drawn * counter.get_total_flops()
    assert f"{drawing.operations / 1e12:,.1f} TFLOP" in capsys.readouterr().out


@pytest.mark.parametrize("features", ["losses", "block"])
def test_the_estimate_of_an_inference_counts_the_passes_of_all_images(
    features, module_of, tiny_backbone, tmp_path
) -> None:
    module = EnvironmentInference(str(tiny_backbone), features, settings=QUICK)
    text = frozen_denoiser(load_pipeline(str(tiny_backbone))).condition([""])["prompt_embeds"]
    given = torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.int64), text
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict(module.denoiser, *given)
    data, estimate = module_of(batch_size=8), ResourceEstimate()
    _trainer(tmp_path, callbacks=[estimate]).predict(
        module, datamodule=data, return_predictions=False
    )
    passes = estimate.operations / (len(data.index.rows("train")) * counter.get_total_flops())
    if features == "losses":
        assert passes == 32
    else:  # two, of which each ends before the half with more channels
        assert 1 / 2 < passes < 1


def test_training_is_the_same_with_and_without_an_estimate(
    module_of, tiny_backbone, environments, tmp_path
) -> None:
    results = []
    for callbacks in ([], [ResourceEstimate()]):
        module = InvariantAdapter(str(tiny_backbone), learning_rate=0.01)
        data = module_of(environments=str(environments), batch_size=12)
        kept = [*callbacks, SaveAdapter(str(tmp_path))]
        _trainer(tmp_path, callbacks=kept).fit(module, datamodule=data)
        results.append(load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors"))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value)


def test_recomputing_activations_is_estimated_with_less_memory(
    module_of, tiny_backbone, environments, tmp_path
) -> None:
    peaks = []
    for checkpointing in (False, True):
        callback = ResourceEstimate()
        module = InvariantAdapter(str(tiny_backbone), gradient_checkpointing=checkpointing)
        data = module_of(environments=str(environments), batch_size=32)
        _trainer(tmp_path, callbacks=[callback], max_steps=1).fit(module, datamodule=data)
        peaks.append(callback.parts["activations of 32 samples"])
    assert peaks[1] < 0.8 * peaks[0]


def test_what_does_not_fit_is_refused_before_the_first_step(
    module_of, tiny_backbone, environments, tmp_path, monkeypatch
) -> None:
    module = InvariantAdapter(str(tiny_backbone))
    data = module_of(environments=str(environments), batch_size=4096)
    free = "invdiff_pl.callbacks.resource_estimate.free_memory"
    # The weights fit, the activations of 4096 samples do not.
    monkeypatch.setattr(free, lambda device: 64 << 20)
    with pytest.raises(InvDiffError, match=r"stage adapter cannot fit on cpu: .* 4096 samples"):
        _trainer(tmp_path / "adapter", callbacks=[ResourceEstimate()]).fit(module, datamodule=data)
    assert not (tmp_path / "adapter" / "adapter").exists()
    monkeypatch.setattr(free, lambda device: -(1 << 30))
    with pytest.raises(InvDiffError, match=r"cannot fit .*--scale\.max_micro_batch"):
        _trainer(tmp_path / "adapter", callbacks=[ResourceEstimate()]).fit(module, datamodule=data)


def test_estimates_of_scoring_and_sampling_tell_images_and_files(
    module_of, tiny_backbone, tmp_path, capsys, monkeypatch
) -> None:
    module = EnvironmentInference(str(tiny_backbone), settings=QUICK)
    callback = ResourceEstimate()
    data = module_of(batch_size=8)
    _trainer(tmp_path, callbacks=[callback]).predict(
        module, datamodule=data, return_predictions=False
    )
    assert callback.parts["weights, trained"] == 0
    assert callback.parts["activations of 8 samples"] > 0

    sampler = ConditionalSampler(str(tiny_backbone), steps=1)
    data = module_of(content="prompts", samples_per_prompt=2, batch_size=4)
    save = SaveSamples(str(tmp_path / "samples"))
    _trainer(tmp_path, callbacks=[ResourceEstimate(), save]).predict(
        sampler, datamodule=data, return_predictions=False
    )
    assert "activations of 4 samples" in capsys.readouterr().out

    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: type("Free", (), {"free": 1000}))
    # What is there already needs no room.
    _trainer(tmp_path, callbacks=[ResourceEstimate()]).predict(
        sampler, datamodule=data, return_predictions=False
    )
    other = ConditionalSampler(str(tiny_backbone), steps=1)
    with pytest.raises(InvDiffError, match="10 images of 32×32 pixels do not fit into"):
        _trainer(tmp_path / "other", callbacks=[ResourceEstimate()]).predict(other, datamodule=data)
    bound = ResourceEstimate(max_samples=9)
    with pytest.raises(InvDiffError, match="10 samples would be drawn, more than max_samples=9"):
        _trainer(tmp_path / "other", callbacks=[bound]).predict(other, datamodule=data)


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
