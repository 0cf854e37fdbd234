"""The stages on a tiny data set and an untrained backbone, through the Lightning modules."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from birds_data import birds_data
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from trainers import adapter_trainer, draw_samples, infer, quiet_trainer

from invdiff_pl.backbones.pipeline import load_pipeline, sample_images
from invdiff_pl.callbacks import ExponentialMovingAverage, HeldOutSelection, ScaleCalibration
from invdiff_pl.data.samples import read_manifest, sample_file
from invdiff_pl.environments.features import BlockFeatures
from invdiff_pl.environments.table import FeatureTable
from invdiff_pl.modules import ConditionalSampler, InvariantAdapter, environment_inference
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_folder
from invdiff_pl.utils.images import image_grid

STEPS = 4


def _infer(root: Path, backbone: Path, folder: Path, **settings) -> dict[str, torch.Tensor]:
    infer(backbone, folder, birds_data(root, backbone, folder / "cache", **settings))
    return load_file(folder / "environments.safetensors")


def _train(
    root: Path, backbone: Path, environments: Path, folder: Path, resume: Path | None = None
) -> dict[str, torch.Tensor]:
    module = InvariantAdapter(
        str(backbone), learning_rate=0.01, warmup_steps=1, train_without_bias=True
    )
    data = birds_data(root, backbone, folder / "cache", environments=str(environments))
    checkpoints = ModelCheckpoint(
        folder / "checkpoints", filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    trainer = adapter_trainer(
        folder,
        max_steps=STEPS,
        enable_checkpointing=True,
        callbacks=[
            ExponentialMovingAverage(0.5),
            HeldOutSelection(2, images=12, output=str(folder)),
            ScaleCalibration(samples=12, steps=2, least_recall=0.0, output=str(folder)),
            checkpoints,
        ],
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def _without(column: str, root: Path, folder: Path) -> Path:
    """A copy of the data set that lacks a column."""
    copy = folder / "without"
    shutil.copytree(root, copy)
    with (root / "metadata.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in rows[0] if name != column]
    with (copy / "metadata.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return copy


def _reversed(column: str, root: Path, folder: Path) -> Path:
    """A copy of the data set whose column is put in reverse order."""
    copy = folder / "reversed"
    shutil.copytree(root, copy)
    with (root / "metadata.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    values = [row[column] for row in rows][::-1]
    assert values != values[::-1]
    with (copy / "metadata.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, column: value} for row, value in zip(rows, values, strict=True))
    return copy


@pytest.fixture(scope="module")
def inferred(birds: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environments")
    _infer(birds, tiny_backbone, folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    birds: Path, tiny_backbone: Path, inferred: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    _train(birds, tiny_backbone, inferred, folder)
    return folder


def _assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("change", [_without, _reversed])
def test_inference_and_training_never_read_the_attribute(
    change, birds, tiny_backbone, inferred, trained, tmp_path
) -> None:
    other = change("place", birds, tmp_path)
    tensors = _infer(other, tiny_backbone, tmp_path / "environments")
    _assert_equal(tensors, load_file(inferred / "environments.safetensors"))
    weights = _train(other, tiny_backbone, tmp_path / "environments", tmp_path / "adapter")
    _assert_equal(weights, load_file(trained / "adapter" / "pytorch_lora_weights.safetensors"))


def _interrupted(*_: object) -> None:
    raise OSError("killed")


def _features(folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / "features" / "features.npy").astype(np.float32))


def test_features_do_not_depend_on_the_batch_size(birds, tiny_backbone, inferred, tmp_path) -> None:
    _infer(birds, tiny_backbone, tmp_path, batch_size=7)
    torch.testing.assert_close(_features(tmp_path), _features(inferred), rtol=2e-3, atol=1e-3)


def test_an_interrupted_inference_keeps_what_it_has(
    birds, tiny_backbone, inferred, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(environment_inference, "find_hidden_attributes", _interrupted)
        with pytest.raises(OSError, match="killed"):
            _infer(birds, tiny_backbone, tmp_path)
    monkeypatch.delattr(BlockFeatures, "__call__")  # all of them are there
    _infer(birds, tiny_backbone, tmp_path)
    assert not (tmp_path / "features" / "parts").exists()
    _assert_equal(
        load_file(tmp_path / "environments.safetensors"),
        load_file(inferred / "environments.safetensors"),
    )


def test_training_changes_the_adapter_and_leaves_the_backbone_alone(
    birds, tiny_backbone, inferred, tmp_path
) -> None:
    before = digest_folder(tiny_backbone)
    module = InvariantAdapter(str(tiny_backbone), learning_rate=0.01, train_without_bias=True)
    frozen = {
        name: parameter.clone()
        for name, parameter in module.pipeline.unet.named_parameters()
        if not parameter.requires_grad
    }
    start = {name: parameter.clone() for name, parameter in module.trainable_parameters().items()}
    data = birds_data(birds, tiny_backbone, tmp_path / "cache", environments=str(inferred))
    quiet_trainer(tmp_path, max_steps=STEPS).fit(module, datamodule=data)
    parameters = dict(module.pipeline.unet.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert any(not torch.equal(parameters[name], value) for name, value in start.items())
    assert digest_folder(tiny_backbone) == before


def test_checkpoints_hold_only_the_adapter(tiny_backbone, trained) -> None:
    checkpoint = torch.load(trained / "checkpoints" / "step=2.ckpt", weights_only=True)
    module = InvariantAdapter(str(tiny_backbone))
    count = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert count == module.adapter.size()
    assert all(".invdiff." in name for name in checkpoint["state_dict"])


def test_training_resumed_from_a_checkpoint_ends_at_the_same_weights(
    birds, tiny_backbone, inferred, trained, tmp_path
) -> None:
    checkpoint = trained / "checkpoints" / "step=2.ckpt"
    weights = _train(birds, tiny_backbone, inferred, tmp_path, resume=checkpoint)
    _assert_equal(weights, load_file(trained / "adapter" / "pytorch_lora_weights.safetensors"))


def test_resuming_after_the_last_step_still_writes_the_adapter(
    birds, tiny_backbone, inferred, trained, tmp_path
) -> None:
    checkpoint = trained / "checkpoints" / f"step={STEPS}.ckpt"
    weights = _train(birds, tiny_backbone, inferred, tmp_path, resume=checkpoint)
    _assert_equal(weights, load_file(trained / "adapter" / "pytorch_lora_weights.safetensors"))


def _sample(birds, backbone, adapter, folder, batch_size=5) -> None:
    module = ConditionalSampler(str(backbone), adapter=str(adapter / "adapter"), steps=2, seed=7)
    data = birds_data(
        birds,
        backbone,
        folder.parent / "cache",
        content="prompts",
        samples_per_prompt=2,
        batch_size=batch_size,
    )
    draw_samples(module, data, folder)


def test_scale_zero_reproduces_the_backbones_images_exactly(
    birds, tiny_backbone, trained, tmp_path
) -> None:
    _sample(birds, tiny_backbone, trained, tmp_path / "samples", batch_size=12)
    data = birds_data(birds, tiny_backbone, tmp_path / "cache", content="prompts")
    conditions = data.conditions()
    images = sample_images(
        load_pipeline(str(tiny_backbone)),
        conditions[torch.arange(6).repeat_interleave(2)],
        conditions.null,
        range(12),
        seed=7,
        steps=2,
        guidance_scale=2.0,
    )
    from invdiff_pl.data.images import read_image

    for index, image in enumerate(images):
        drawn = read_image(tmp_path / "samples" / sample_file(0.0, index), 32)
        assert torch.equal(drawn, image)
    changed = [read_image(tmp_path / "samples" / sample_file(1.0, i), 32) for i in range(12)]
    assert not torch.equal(torch.stack(changed), images)


def test_samples_depend_neither_on_batch_size_nor_on_interruption(
    birds, tiny_backbone, trained, tmp_path
) -> None:
    _sample(birds, tiny_backbone, trained, tmp_path / "whole" / "samples")
    other = tmp_path / "other" / "samples"
    _sample(birds, tiny_backbone, trained, other, batch_size=5)
    (other / sample_file(1.0, 6)).unlink()
    (other / "manifest.jsonl").unlink()
    _sample(birds, tiny_backbone, trained, other, batch_size=5)
    assert digest_folder(other) == digest_folder(tmp_path / "whole" / "samples")


def test_the_manifest_tells_prompt_and_seed_of_every_image(
    birds, tiny_backbone, trained, tmp_path
) -> None:
    _sample(birds, tiny_backbone, trained, tmp_path / "samples")
    samples = read_manifest(tmp_path / "samples")
    assert len(samples) == 2 * 6 * 2
    for sample in samples:
        assert (tmp_path / "samples" / sample.file).is_file()
        assert sample.seed == 7
        assert sample.prompt.startswith("a photo of a")
    assert {sample.invariant_scale for sample in samples} == {0.0, 1.0}


def test_a_feature_that_is_not_finite_stops_the_inference_and_keeps_the_others(
    tiny_backbone, birds, tmp_path, monkeypatch
) -> None:
    right = BlockFeatures.__call__

    def wrong(self: BlockFeatures, latents: torch.Tensor) -> torch.Tensor:
        features = right(self, latents)
        features[3] = torch.nan
        return features

    monkeypatch.setattr(BlockFeatures, "__call__", wrong)
    with pytest.raises(InvDiffError, match=r"features of image 3 of the train split.*32-true"):
        _infer(birds, tiny_backbone, tmp_path)
    kept = FeatureTable(tmp_path / "features" / "parts").rows()
    assert len(kept) > 0
    assert 3 not in kept
    monkeypatch.setattr(BlockFeatures, "__call__", right)
    _infer(birds, tiny_backbone, tmp_path)
    assert (tmp_path / "environments.safetensors").is_file()


def test_samples_that_are_not_finite_are_refused_by_number(tiny_backbone, birds, tmp_path) -> None:
    data = birds_data(birds, tiny_backbone, tmp_path / "cache", content="prompts")
    conditions = data.conditions()
    conditions[:]["prompt_embeds"][1] = torch.nan
    with pytest.raises(InvDiffError, match="sample 41 has pixels that are not finite"):
        sample_images(
            load_pipeline(str(tiny_backbone)),
            conditions[:3],
            conditions.null,
            [40, 41, 42],
            seed=7,
            steps=1,
            guidance_scale=2.0,
        )


def test_a_damaged_sample_of_an_interrupted_run_is_drawn_again(
    birds, tiny_backbone, trained, tmp_path
) -> None:
    folder = tmp_path / "samples"
    _sample(birds, tiny_backbone, trained, folder)
    before = digest_folder(folder)
    for index, content in ((3, b""), (7, b"no picture")):
        (folder / sample_file(1.0, index)).write_bytes(content)
    _sample(birds, tiny_backbone, trained, folder)
    assert digest_folder(folder) == before


def test_environments_of_another_data_set_are_refused(
    tiny_backbone, birds, inferred, tmp_path
) -> None:
    shorter = tmp_path / "shorter"
    shutil.copytree(birds, shorter)
    lines = (birds / "metadata.csv").read_text().splitlines()
    (shorter / "metadata.csv").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    with pytest.raises(InvDiffError, match="rerun the environments stage"):
        _train(shorter, tiny_backbone, inferred, tmp_path / "adapter")


def test_a_grid_places_images_row_by_row() -> None:
    images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    grid = image_grid(images, columns=2, zoom=1)
    assert grid.shape == (3, 4, 4)
    assert grid[0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
