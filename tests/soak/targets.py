"""Every reader of the package, with files that it reads well, to be fed damaged ones."""

import copy
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import lives
import mutations
import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file

from invdiff_pl import replay, verify
from invdiff_pl import run as runner
from invdiff_pl.adapters import build_adapter, load_adapter
from invdiff_pl.checkpoints import SafeCheckpointIO
from invdiff_pl.data.broken import readable_rows
from invdiff_pl.data.cache import ShardedTensor, build_shards
from invdiff_pl.data.celeba import CelebADataModule
from invdiff_pl.data.custom import TableDataModule
from invdiff_pl.data.fairface import FairFaceDataModule
from invdiff_pl.data.images import inspect_image, read_image
from invdiff_pl.data.index import content_digest
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.diffusion.pipeline import load_pipeline
from invdiff_pl.environments.table import LossTable
from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import digest_folder
from invdiff_pl.locks import run_lock
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.records import read_record, write_listing, write_record
from invdiff_pl.samples import Sample, manifest_text, read_manifest
from invdiff_pl.stages import fingerprint

_SECONDS = 60


@dataclass(frozen=True)
class Target:
    """A reader and what it reads.

    Attributes:
        kind: of the input, to be counted by.
        make: writes healthy files into an empty folder.
        read: reads them; may refuse with an InvDiffError, and nothing else.
        files: pattern of the files that are damaged.
        how: ways to damage them.
        writes: whether reading may write into the folder.
        cost: how much longer than the others it takes; fewer inputs are tried.
    """

    kind: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: str
    how: tuple[mutations.Mutation, ...] = (mutations.at_random,)
    writes: bool = False
    cost: int = 1


class HangError(Exception):
    """A reader took too long."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise :class:`HangError` after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"no answer after {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def feed(target: Target, healthy: Path, folder: Path, seed: int) -> bool:
    """Damage one file and read.

    Returns:
        whether it was read; it was refused otherwise.

    Raises:
        AssertionError: if the reader failed in any other way, hung or changed a file.
    """
    source = random.Random(seed)
    shutil.copytree(healthy, folder)
    path = source.choice(sorted(path for path in folder.glob(target.files) if path.is_file()))
    path.write_bytes(source.choice(target.how)(path.read_bytes(), source))
    before = digest_folder(folder)
    what = f"{target.kind}, seed {seed}, file {path.relative_to(folder)} in {folder}"
    try:
        with limited(_SECONDS):
            target.read(folder)
        read = True
    except InvDiffError:
        read = False
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert target.writes or digest_folder(folder) == before, f"{what}: a file was changed"
    for path in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(path)
    return read


def _images(folder: Path, names: Sequence[str]) -> None:
    source = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = source.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def _rows(names: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "file_name": names,
            "text": ["a photo of a bird", "a photo of a fish"] * (len(names) // 2),
            "split": [0, 0, 1, 1, 2, 2] * (len(names) // 6),
            "place": ["land", "water", "water", "land"] * (len(names) // 4),
        }
    )


_NAMES = [f"kind {n % 2}/picture {n}.png" for n in range(12)]


def _table(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _images(folder, _NAMES)
        rows = _rows(_NAMES)
        path = folder / f"metadata{suffix}"
        if suffix == ".parquet":
            rows.to_parquet(path)
        elif suffix == ".jsonl":
            rows.to_json(path, orient="records", lines=True)
        else:
            rows.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")

    return make


def _settings(folder: Path) -> dict:
    return {"root": str(folder), "backbone": "", "resolution": 8, "cache_dir": f"{folder}-cache"}


def _read_data(module) -> None:
    index = module.index
    for split in ("train", "val", "test"):
        index.rows(split)
    attributes = module.attributes()
    assert attributes is None or len(attributes) == len(index)
    assert module.attribute_names is not None
    assert all(".." not in Path(name).parts for name in index.files)


def _read_table(folder: Path) -> None:
    _read_data(TableDataModule(attribute_column="place", **_settings(folder)))


def _make_waterbirds(folder: Path) -> None:
    names = [f"00{n % 2}.A_bird/{n}.png" for n in range(12)]
    _images(folder, names)
    rows = pd.DataFrame({"img_id": range(12), "img_filename": names, "y": [0, 1] * 6})
    rows["split"], rows["place"] = [0, 0, 1, 1, 2, 2] * 2, [0, 1, 1, 0] * 3
    rows.to_csv(folder / "metadata.csv", index=False)


def _make_celeba(folder: Path) -> None:
    names = [f"{n:06d}.jpg" for n in range(1, 25)]
    _images(folder, [f"img_align_celeba/{name}" for name in names])
    columns = ["Black_Hair", "Blond_Hair", "Male"]
    lines = [str(len(names)), " ".join(columns)]
    lines += [f"{name}  {1 - 2 * (n % 2)} {2 * (n % 2) - 1} {1 - n // 2 % 2 * 2}"
              for n, name in enumerate(names)]  # fmt: skip
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{name} {n // 4 % 3}" for n, name in enumerate(names)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


def _make_fairface(folder: Path) -> None:
    races = ("White", "East Asian", "Indian", "Black")
    for split, eighths in (("train", 1), ("val", 8)):
        names = [f"{split}/{n}.jpg" for n in range(8 * eighths)]
        (folder / split).mkdir()
        for name in names:
            (folder / name).touch()  # the tables are read here, not the images
        genders = ["Male", "Female"] * 4 * eighths
        rows = pd.DataFrame({"file": names, "age": "20-29", "gender": genders})
        rows["race"] = [race for race in races for _ in range(2)] * eighths
        rows["service_test"] = True
        rows.to_csv(folder / f"fairface_label_{split}.csv", index=False)


def _read_celeba(folder: Path) -> None:
    _read_data(CelebADataModule(ratio="1:1:1:1", **_settings(folder)))


def _read_fairface(folder: Path) -> None:
    _read_data(FairFaceDataModule(ratio="1:1:1:1:1:1:1:1", **_settings(folder)))


def _make_images(folder: Path) -> None:
    source = np.random.default_rng(0)
    pixels = source.integers(0, 256, (24, 30, 4), dtype=np.uint8)
    colour, clear = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "turned.jpg", exif=exif)
    colour.save(folder / "colour.png")
    colour.quantize(16).save(folder / "palette.gif")
    colour.convert("CMYK").save(folder / "cmyk.tif")
    colour.save(folder / "plain.bmp")
    colour.save(folder / "colour.webp")
    clear.save(folder / "clear.png")
    colour.quantize(16).save(folder / "palette.png", transparency=0)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    colour.convert("L").save(folder / "grey.jpg")


def _read_images(folder: Path) -> None:
    refusal = None
    for path in sorted(folder.iterdir()):
        facts = inspect_image(path)
        try:
            image = read_image(path, 8)
        except InvDiffError as error:
            assert facts.problem is not None
            refusal = error
        else:
            assert facts.problem is None
            assert image.shape == (3, 8, 8)
    if refusal is not None:
        raise refusal


def _make_shards(folder: Path) -> None:
    values = torch.arange(20 * 2 * 3).reshape(20, 2, 3).half()
    build_shards(folder, 20, lambda rows: values[list(rows)], "building")
    (folder / ".lock").unlink()


def _read_shards(folder: Path) -> None:
    shards = ShardedTensor(folder)
    rows = torch.arange(min(len(shards), 100))
    shards.gather(rows)


def _make_environments(folder: Path) -> None:
    _make_waterbirds(folder / "birds")
    tensors = {"assignments": torch.tensor([0, 1, 1, 0]), "scores": torch.rand(4).double()}
    (folder / "environments").mkdir()
    save_file(tensors, folder / "environments" / "environments.safetensors")


def _read_environments(folder: Path) -> None:
    settings = _settings(folder / "birds")
    data = WaterbirdsDataModule(environments=str(folder / "environments"), **settings)
    assert data.inferred().groups >= 1


def _make_losses(folder: Path) -> None:
    table = LossTable(folder, (2, 3), flush_rows=4)
    for rows in torch.arange(10).split(4):
        table.append(rows, torch.rand(len(rows), 2, 2, 3))
    table.flush()


def _read_losses(folder: Path) -> None:
    LossTable(folder, (2, 3)).read(10)


def _make_manifest(folder: Path) -> None:
    samples = [
        Sample(f"scale-0.00/{n:06d}.png", n, "a photo of 鳥", 0, 0.0, 1, 2.0, 20, "DDIMScheduler")
        for n in range(5)
    ]
    (folder / "manifest.jsonl").write_text(manifest_text(samples), encoding="utf-8")


def _make_run(folder: Path) -> None:
    for name in ("environments", "adapter"):
        stage = folder / name
        _images(stage, ["inner/picture.png"])
        (stage / "config.json").write_text('{"a": 1}')
        write_record(stage / "stage.json", {"fingerprint": "f", "files": write_listing(stage)})
    write_record(folder / "samples" / "started.json", {"fingerprint": "f"})
    words = ["--experiment", "waterbirds", "--scale", "mini"]
    (folder / "run.json").write_text(json.dumps({"train": words}))
    (folder / ".lock").write_text("")


def _read_run(folder: Path) -> None:
    verify.run([str(folder)])
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
    options, overrides = runner._parser("train").parse_known_args(words)
    experiment = runner._experiment("train", options, overrides)
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


# Memos are found by the path that they were made for, so these are read from within the folder.


def _make_memos(folder: Path) -> None:
    _make_waterbirds(folder / "birds")
    _read_memos(folder)


def _read_memos(folder: Path) -> None:
    with chdir(folder):
        index = WaterbirdsDataModule(**_settings(Path("birds"))).index
        content_digest(index.root, index.files, Path("content"))
        rows, _ = readable_rows(index, Path("broken"))
        assert len(rows) > 0


def _make_split(folder: Path) -> None:
    _make_celeba(folder / "faces")
    _read_split(folder)


def _read_split(folder: Path) -> None:
    with chdir(folder):
        _read_data(CelebADataModule(ratio="1:1:1:1", **_settings(Path("faces"))))


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
        build_adapter("lora", healthy, rank=1).save(folder, backbone_size=1)

    def read_adapter(folder: Path) -> None:
        load_adapter(folder, copy.deepcopy(unet))

    config = (mutations.at_random, mutations.in_json, mutations.in_json, mutations.in_json)
    tensors = (mutations.at_random, mutations.in_safetensors)
    return [
        Target("adapter", make_adapter, read_adapter, "*.json", config, cost=4),
        Target("adapter", make_adapter, read_adapter, "*.safetensors", tensors, cost=4),
        Target("pipeline", make_pipeline, _read_pipeline, "**/*.json", config, cost=20),
        Target("pipeline", make_pipeline, _read_pipeline, "**/*.safetensors", tensors, cost=20),
    ]


_CELLS = (mutations.at_random, mutations.in_lines, mutations.in_lines)
_JSON = (mutations.at_random, mutations.in_json, mutations.in_json)
_LINES = (mutations.at_random, mutations.in_json_lines, mutations.in_json_lines)
_TENSORS = (mutations.at_random, mutations.in_safetensors)
TARGETS = [
    Target("CSV", _table(".csv"), _read_table, "metadata.csv", _CELLS),
    Target("TSV", _table(".tsv"), _read_table, "metadata.tsv", _CELLS),
    Target("JSON lines", _table(".jsonl"), _read_table, "metadata.jsonl", _LINES),
    Target("Parquet", _table(".parquet"), _read_table, "metadata.parquet"),
    Target(
        "CSV", _make_waterbirds, lambda f: _read_data(WaterbirdsDataModule(**_settings(f))),
        "metadata.csv", _CELLS,
    ),
    Target("CelebA tables", _make_celeba, _read_celeba, "*.txt", _CELLS),
    Target("FairFace tables", _make_fairface, _read_fairface, "*.csv", _CELLS),
    Target("images", _make_images, _read_images, "*"),
    Target("cache shards", _make_shards, _read_shards, "*.safetensors", _TENSORS),
    Target("cache shards", _make_shards, _read_shards, "*.json", _JSON),
    Target("environments", _make_environments, _read_environments, "environments/*", _TENSORS),
    Target("losses", _make_losses, _read_losses, "*.safetensors", _TENSORS),
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
    Target("memos", _make_split, _read_split, "faces-cache/splits/*.csv", _CELLS, writes=True),
    Target("memos", _make_memos, _read_memos, "[cb]*/*.json", _JSON, writes=True),
]  # fmt: skip
