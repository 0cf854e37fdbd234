"""Every reader of the package, with files that it reads well, to be fed damaged ones."""

import copy
import json
import shutil
from pathlib import Path

import lives
import mutations
import numpy as np
import torch
from data_files import (
    images,
    make_celeba,
    make_fairface,
    make_images,
    make_memos,
    make_split,
    make_waterbirds,
    read_celeba,
    read_data,
    read_fairface,
    read_images,
    read_memos,
    read_split,
    read_table,
    settings,
    table,
)
from feeding import Target
from safetensors.torch import save_file

from invdiff_pl.adapters import build_adapter, load_adapter
from invdiff_pl.adapters.lora import active_adapters
from invdiff_pl.adapters.stack import carrying
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.cli import replay
from invdiff_pl.cli.experiment import experiment_of
from invdiff_pl.data.cache import ShardedTensor, build_shards
from invdiff_pl.data.prompt_lists import read_prompts
from invdiff_pl.data.samples import Sample, manifest_text, read_manifest
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.environments.given_features import read_features
from invdiff_pl.environments.table import FeatureTable
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.utils.locks import run_lock
from invdiff_pl.workflow import verify
from invdiff_pl.workflow.checkpoints import SafeCheckpointIO
from invdiff_pl.workflow.due import fingerprint
from invdiff_pl.workflow.records import read_record, write_listing, write_record


def _make_shards(folder: Path) -> None:
    values = torch.arange(20 * 2 * 3).reshape(20, 2, 3).half()
    build_shards(folder, 20, lambda rows: values[list(rows)], "building")
    (folder / ".lock").unlink()


def _read_shards(folder: Path) -> None:
    shards = ShardedTensor(folder)
    rows = torch.arange(min(len(shards), 100))
    shards.gather(rows)


def _make_environments(folder: Path) -> None:
    make_waterbirds(folder / "birds")
    tensors = {"assignments": torch.tensor([0, 1, 1, 0]), "scores": torch.rand(4).double()}
    (folder / "environments").mkdir()
    save_file(tensors, folder / "environments" / "environments.safetensors")


def _read_environments(folder: Path) -> None:
    inferred = str(folder / "environments")
    data = WaterbirdsDataModule(environments=inferred, **settings(folder / "birds"))
    assert data.inferred().groups >= 1


def _make_features(folder: Path) -> None:
    table = FeatureTable(folder, flush_rows=4)
    for rows in torch.arange(10).split(4):
        table.append(rows, rows % 2, torch.rand(len(rows), 6))
    table.flush()


def _read_features(folder: Path) -> None:
    FeatureTable(folder).read(folder / "features.npy")


def _make_own_features(folder: Path) -> None:
    np.save(folder / "mine.npy", np.ones((10, 6), dtype=np.float32))
    save_file({"mine": torch.rand(10, 6)}, folder / "mine.safetensors")


def _read_own_features(folder: Path) -> None:
    for suffix in (".npy", ".safetensors"):
        assert read_features(folder / f"mine{suffix}", 10).shape == (10, 6)


def _make_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("# 鳥\na photo of 鳥\n a dog; in rain\n", encoding="utf-8")


def _read_prompts(folder: Path) -> None:
    assert read_prompts(str(folder / "prompts.txt"))


def _make_manifest(folder: Path) -> None:
    samples = [
        Sample(f"scale-0.00/{n:06d}.png", n, "a photo of 鳥", 0, 0.0, 1, 2.0, 20, "DDIMScheduler")
        for n in range(5)
    ]
    (folder / "manifest.jsonl").write_text(manifest_text(samples), encoding="utf-8")


def _make_run(folder: Path) -> None:
    for name in ("environments", "adapter"):
        stage = folder / name
        images(stage, ["inner/picture.png"])
        (stage / "config.json").write_text('{"a": 1}')
        write_record(stage / "stage.json", {"fingerprint": "f", "files": write_listing(stage)})
    write_record(folder / "samples" / "started.json", {"fingerprint": "f"})
    words = ["--experiment", "waterbirds", "--scale", "mini"]
    (folder / "run.json").write_text(json.dumps({"train": words}))
    (folder / ".lock").write_text("")


def _read_run(folder: Path) -> None:
    verify.run_verify([str(folder)])
    read_record(folder / "samples" / "started.json")
    replay.command_of(folder)
    replay.compare(folder, folder, ["environments", "adapter", "samples"])


def _make_lock(folder: Path) -> None:
    entry = {"pid": 1, "host": "elsewhere", "started": "1", "since": "now", "command": "train"}
    (folder / "lock.json").write_text(json.dumps(entry))


def _read_lock(folder: Path) -> None:
    (folder / "lock.json").replace(folder / ".lock")
    with run_lock(folder, "a test"):
        pass


def _make_experiments(folder: Path) -> None:
    shutil.copytree(lives.REPOSITORY / "experiments", folder / "experiments")
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "model_index.json").write_text("{}")


def _read_experiments(folder: Path) -> None:
    words = ["--experiment", "waterbirds", "--experiments", str(folder / "experiments")]
    words += ["--backbone", str(folder / "pipeline"), "--run-dir", str(folder / "run")]
    experiment = experiment_of("train", words)
    for stage in experiment.plan("train"):
        experiment.arguments(stage)
        fingerprint(experiment, stage)


def _make_checkpoint(folder: Path) -> None:
    content = {"state_dict": {"w": torch.arange(30.0)}, "global_step": 3, "loops": {"a": [1, None]}}
    SafeCheckpointIO().save_checkpoint(content, folder / "last.ckpt")


def _read_checkpoint(folder: Path) -> None:
    SafeCheckpointIO().load_checkpoint(folder / "last.ckpt")


def _make_classifier(folder: Path) -> None:
    SampleClassifier(2, 3).save(folder, {"attribute_names": ["a", "b"]})


def _read_pipeline(folder: Path) -> None:
    load_pipeline(str(folder))


def _read_classifier(folder: Path) -> None:
    SampleClassifier.load(folder)


def pipeline_targets(backbone: Path) -> list[Target]:
    """Readers of a pipeline folder and of what is attached to it."""
    unet = load_pipeline(str(backbone)).unet

    def make_pipeline(folder: Path) -> None:
        shutil.copytree(backbone, folder, dirs_exist_ok=True)

    def make_adapter(folder: Path) -> None:
        healthy = load_pipeline(str(backbone)).unet
        build_adapter("lora", healthy, rank=1).save(folder)

    def read_adapter(folder: Path) -> None:
        load_adapter(folder, copy.deepcopy(unet))

    pipeline = load_pipeline(str(backbone))

    def audit_adapter(folder: Path) -> None:
        try:
            with carrying(pipeline, [folder]):
                pass
        finally:
            assert not active_adapters(pipeline.unet)

    config = (mutations.at_random, mutations.in_json, mutations.in_json, mutations.in_json)
    tensors = (mutations.at_random, mutations.in_safetensors)
    return [
        Target("adapter", make_adapter, read_adapter, "*.json", config, cost=4),
        Target("adapter", make_adapter, read_adapter, "*.safetensors", tensors, cost=4),
        Target("audited LoRA", make_adapter, audit_adapter, "*.safetensors", tensors, cost=4),
        Target("pipeline", make_pipeline, _read_pipeline, "**/*.json", config, cost=20),
        Target("pipeline", make_pipeline, _read_pipeline, "**/*.safetensors", tensors, cost=20),
    ]


_CELLS = (mutations.at_random, mutations.in_lines, mutations.in_lines)
_JSON = (mutations.at_random, mutations.in_json, mutations.in_json)
_LINES = (mutations.at_random, mutations.in_json_lines, mutations.in_json_lines)
_TENSORS = (mutations.at_random, mutations.in_safetensors)
TARGETS = [
    Target("CSV", table(".csv"), read_table, "metadata.csv", _CELLS),
    Target("TSV", table(".tsv"), read_table, "metadata.tsv", _CELLS),
    Target("JSON lines", table(".jsonl"), read_table, "metadata.jsonl", _LINES),
    Target("Parquet", table(".parquet"), read_table, "metadata.parquet"),
    Target(
        "CSV", make_waterbirds, lambda f: read_data(WaterbirdsDataModule(**settings(f))),
        "metadata.csv", _CELLS,
    ),
    Target("CelebA tables", make_celeba, read_celeba, "*.txt", _CELLS),
    Target("FairFace tables", make_fairface, read_fairface, "*.csv", _CELLS),
    Target("images", make_images, read_images, "*"),
    Target("cache shards", _make_shards, _read_shards, "*.safetensors", _TENSORS),
    Target("cache shards", _make_shards, _read_shards, "*.json", _JSON),
    Target("environments", _make_environments, _read_environments, "environments/*", _TENSORS),
    Target("features", _make_features, _read_features, "*.safetensors", _TENSORS, writes=True),
    Target("own features", _make_own_features, _read_own_features, "mine.npy"),
    Target("own features", _make_own_features, _read_own_features, "mine.safetensors", _TENSORS),
    Target("prompt lists", _make_prompts, _read_prompts, "*.txt"),
    Target("manifest", _make_manifest, read_manifest, "*.jsonl", _LINES),
    Target("run records", _make_run, _read_run, "**/*.json", _JSON),
    Target("lock", _make_lock, _read_lock, "*.json", _JSON, writes=True),
    Target(
        "YAML", _make_experiments, _read_experiments, "experiments/**/*.yaml",
        (mutations.at_random, mutations.in_yaml, mutations.in_yaml), cost=4,
    ),
    Target("checkpoints", _make_checkpoint, _read_checkpoint, "*.ckpt"),
    Target("classifier", _make_classifier, _read_classifier, "*.json", _JSON, cost=4),
    Target("classifier", _make_classifier, _read_classifier, "*.safetensors", _TENSORS, cost=4),
    Target("memos", make_split, read_split, "faces-cache/splits/*.csv", _CELLS, writes=True),
    Target("memos", make_memos, read_memos, "[cb]*/*.json", _JSON, writes=True),
]  # fmt: skip
