"""What a stage is estimated to take, before it starts, against what is counted by hand."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from trainers import QUICK, quiet_trainer

from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.noising import predict
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.callbacks import MaxMicroBatch, ResourceEstimate, SaveAdapter, SaveSamples
from invdiff_pl.callbacks.resource_estimate import PeakMemory, activations
from invdiff_pl.modules import ConditionalSampler, EnvironmentInference, InvariantAdapter
from invdiff_pl.utils import resources
from invdiff_pl.utils.errors import InvDiffError

_trainer = partial(quiet_trainer, max_steps=2)


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


def test_the_peak_is_of_what_lives_at_once() -> None:
    given = torch.zeros(1000)
    with PeakMemory() as memory:
        first = given + 1  # 4000 bytes
        second = first * 2  # 8000 alive
        assert memory.peak == 8000
        del first  # 4000
        third = second.view(10, 100)  # the same storage
        fourth = third.repeat(1, 3)  # 4000 + 12000
        del second, third, fourth
        _ = given.add_(1)  # its own storage
    assert memory.peak == 16000


def test_the_peak_of_a_backward_pass_holds_what_was_saved_and_the_gradients() -> None:
    weights = torch.ones(100, requires_grad=True)
    with PeakMemory() as memory:
        # exp saves its result (400 bytes); the sum and its gradient are 4 each; the gradient of
        # the product is 400 (the sum's gradient is expanded without a copy).
        loss = weights.exp().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.shape == (100,)
    assert memory.peak == 400 + 4 + 4 + 400


def test_activations_grow_in_proportion_to_the_batch() -> None:
    def run(count: int) -> None:
        kept = torch.zeros(25), torch.zeros(count, 100)
        del kept

    assert activations(run, 1) == 100 + 400
    assert activations(run, 8) == 100 + 8 * 400
