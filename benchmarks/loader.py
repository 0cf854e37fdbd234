"""How fast the cached loader delivers latents of 512-pixel images, against a training step.

    python benchmarks/loader.py
    python benchmarks/loader.py --items 30000 --batch-size 64

Shards of posterior moments, float16 [N, 2, 8, 64, 64] (image and mirror image, 128 KiB together),
are laid out in a temporary folder and read by the loader that training uses. Three states:

- real, warm: written bytes in the page cache, as after a first epoch if they fit in memory;
- real, cold: the page cache is emptied of them first, so that every row comes from the disk, as if
  they did not fit in memory;
- sparse: files of the full size without blocks on the disk, for sizes too large to write. Every
  page is still allocated and copied, but nothing is read from the disk.

The step is a forward and backward pass of the shipped denoiser, with 2.5 million parameters, on
latents of the same size and batch; a Stable Diffusion denoiser has 860 million.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from torch.utils.data import DataLoader, Sampler

from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.data.batches import (
    BatchPlan,
    PairedEnvironmentBatches,
    Selection,
    ShuffledBatches,
)
from invdiff_pl.data.cache import SHARD_ROWS, ShardedTensor
from invdiff_pl.data.datasets import LatentBatch, LatentDataset
from invdiff_pl.utils.files import write_json
from invdiff_pl.utils.quiet import silence

ROW = (2, 8, 64, 64)
ROW_BYTES = 2 * 8 * 64 * 64 * 2
PROMPTS = 6
RARE = 0.05  # share of the second environment


def lay_out(folder: Path, items: int, real: bool) -> None:
    """Write a complete cache of ``items`` rows."""
    # All shards get the same bytes, since only reading is measured.
    values = torch.randn((SHARD_ROWS if real else 0, *ROW)).half().numpy()
    for number, start in enumerate(range(0, items, SHARD_ROWS)):
        rows = min(SHARD_ROWS, items - start)
        shape = ",".join(map(str, (rows, *ROW)))
        size = rows * ROW_BYTES
        header = f'{{"values":{{"dtype":"F16","shape":[{shape}],"data_offsets":[0,{size}]}}}}'
        text = header.encode().ljust(256)
        with (folder / f"{number:05d}.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            if real:
                stream.write(values[:rows].data)
                stream.flush()
                os.fsync(stream.fileno())
            else:
                stream.truncate(8 + len(text) + size)
    write_json(folder / "shards.json", {"rows": items, "shard_rows": SHARD_ROWS})


def forget(folder: Path) -> None:
    """Ask the kernel to drop the shards from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Read the shards into the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            while stream.read(1 << 22):
                pass


def loader(folder: Path, items: int, batch_size: int, batches: int, paired: bool) -> DataLoader:
    """Build the loader of the adapter stage (paired) or of the backbone stage."""
    source = torch.Generator().manual_seed(0)
    prompts = torch.randint(PROMPTS, (items,), generator=source)
    environments = (torch.rand(items, generator=source) < RARE).long()
    memberships = torch.nn.functional.one_hot(environments, 2).float()
    plan = BatchPlan(batch_size=batch_size, seed=0, first=0, last=batches)
    sampler: Sampler[Selection] = (
        PairedEnvironmentBatches(prompts, memberships, plan)
        if paired
        else ShuffledBatches(items, plan)
    )
    dataset = LatentDataset(ShardedTensor(folder), prompts, memberships if paired else None)
    return DataLoader(dataset, sampler=sampler, batch_size=None)


def seconds_a_batch(batches: DataLoader) -> list[float]:
    """Measure the wall time of each batch but the first, which includes the start."""
    stream: Iterator[LatentBatch] = iter(batches)
    next(stream)
    seconds = []
    while True:
        started = time.perf_counter()
        if next(stream, None) is None:
            return sorted(seconds)
        seconds.append(time.perf_counter() - started)


def seconds_a_step(batch_size: int, steps: int) -> float:
    """Measure the median wall time of a forward and backward pass of the shipped denoiser."""
    pipeline = load_pipeline("asset:waterbirds")
    unet = pipeline.unet.requires_grad_(True).train()
    latents = torch.randn(batch_size, unet.config.in_channels, *ROW[-2:])
    embeddings = torch.randn(batch_size, 77, unet.config.cross_attention_dim)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        unet(latents, torch.tensor(500), embeddings).sample.square().mean().backward()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[steps // 2]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--items", type=int, nargs="+", default=[30_000, 200_000])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=100, help="measured in each row")
    parser.add_argument("--steps", type=int, default=2, help="of the denoiser, to compare with")
    parser.add_argument("--real-gib", type=float, default=4.0, help="sparse files from this size")
    parser.add_argument("--folder", type=Path, help="where to lay them out; the system's otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence()
    diffusers.utils.logging.disable_progress_bar()
    step = seconds_a_step(options.batch_size, options.steps)
    print(f"a step of {options.batch_size} latents: {step:.3f} s\n")
    header = ("items", "GiB", "files", "batches", "ms, median", "ms, worst", "step / batch")
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for items in options.items:
        size = items * ROW_BYTES / 2**30
        real = size <= options.real_gib
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            lay_out(folder, items, real)
            for state in ("real, cold", "real, warm") if real else ("sparse",):
                for paired in (False, True):
                    if state == "real, cold":
                        forget(folder)
                    elif state == "real, warm":
                        remember(folder)
                    batches = loader(folder, items, options.batch_size, options.batches, paired)
                    seconds = seconds_a_batch(batches)
                    median, worst = seconds[len(seconds) // 2], seconds[-1]
                    kind = "balanced pairs" if paired else "shuffled"
                    cells = (f"{items}", f"{size:.1f}", state, kind)
                    times = (f"{1e3 * median:.1f}", f"{1e3 * worst:.1f}", f"{step / median:.0f}")
                    print("| " + " | ".join(cells + times) + " |", flush=True)
                    del batches


if __name__ == "__main__":
    main()
