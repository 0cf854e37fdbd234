"""How well hidden attributes are found in one pass, and how often where there are none.

    python benchmarks/discovery.py --cache DIR [--experiments …] [--seeds 0 1] [--halves 100]
    python benchmarks/discovery.py --cache DIR --photographs data/waterbirds_photos data/things
    python benchmarks/discovery.py --cache DIR --two-biases 0.95:0.8 0.8:0.95 [--seeds 0 1]

For each rendered data set and seed a pool is drawn, and the features of all its pictures are taken
once with the shipped backbone; splits of every strength of bias are drawn from the pool. The table
shows, for the first candidate, the AUC of its conflict for images against the bias, the worst
group's recall of images with positive conflict, evidence, alignment, p-value and verdict; and,
where there is no bias, in how many random halves one is reported. Pools, features and rows are kept
in the cache and not computed again, rows as long as the code is the same.

With ``--two-biases`` birds are drawn whose place and light both go along with the species,
independently of each other given the species; the numbers are the shares of each species' pictures
in its own place and in its own light. Each candidate's AUC is given for images against either bias.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import invdiff_pl.environments
from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.latents import encoded_moments
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.data.celeba import CelebADataModule
from invdiff_pl.data.fairface import FairFaceDataModule
from invdiff_pl.data.images import read_images, to_float
from invdiff_pl.data.synthetic.celeba import RenderedCelebA, render_celeba
from invdiff_pl.data.synthetic.fairface import RenderedFairFace, render_fairface
from invdiff_pl.data.synthetic.waterbirds import RenderedWaterbirds, render_waterbirds
from invdiff_pl.data.tables import check_codes, read_table
from invdiff_pl.environments.features import LEVELS, image_features
from invdiff_pl.environments.hidden_attribute import (
    HiddenAttribute,
    HiddenAttributeSettings,
    find_hidden_attributes,
)
from invdiff_pl.environments.quality import auc, conflicting, worst_group_precision_recall
from invdiff_pl.utils.files import digest_file, digest_json, read_json, write_json
from invdiff_pl.utils.tensors import read_tensors, write_tensors

# Sizes of the groups (prompt by prompt, attribute by attribute) by strength; the first has no bias.
# Number of birds of each of three landbird and three waterbird species, as published.
LAND, WATER = 3682 / 3, 1113 / 3
RATIOS: dict[str, dict[str, tuple[float, ...]]] = {
    "waterbirds": {
        str(own): (LAND * own, LAND * (1 - own)) * 3 + (WATER * (1 - own), WATER * own) * 3
        for own in (0.5, 0.7, 0.9, 0.95, 0.99)
    },
    "fairface": {
        "1:1:1:1": (1, 1, 1, 1, 1, 1, 1, 1),
        "3:2:1:1": (3, 2, 1, 1, 1, 1, 2, 3),
        "8:4:1:1": (8, 4, 1, 1, 1, 1, 4, 8),
    },
    "celeba": {
        "1:1:1:1": (1, 1, 1, 1),
        "1:2:2:1": (1, 2, 2, 1),
        "1:4:4:1": (1, 4, 4, 1),
        "1:8:8:1": (1, 8, 8, 1),
    },
}
COLUMNS = (
    "auc",
    "recall",
    "values",
    "evidence",
    "alignment",
    "p_value",
    "verdict",
    "rank",
    "seconds",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute what is missing, and print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder of pools and rows")
    parser.add_argument("--experiments", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--strengths", nargs="+", help="names of strengths; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--images", type=int, default=2400, help="of each split")
    parser.add_argument("--halves", type=int, default=0, help="of data without a bias")
    parser.add_argument("--photographs", type=Path, nargs="+", help="folders of docs/real_photos")
    parser.add_argument("--backbone", help="of the photographs; the shipped ones if not given")
    parser.add_argument("--two-biases", nargs="+", metavar="PLACE:LIGHT", help="their strengths")
    options = parser.parse_args(arguments)
    if options.two_biases is not None:
        print("| place : light | seed | candidate | verdict | evidence | AUC place | AUC light |")
        print("| --- " * 7 + "|")
        for seed in options.seeds:
            for strength in options.two_biases:
                two_biases(strength, seed, options.cache)
        return
    first = ("data set", "strength", "seed")
    if options.photographs is not None:
        first = ("folder", "backbone", "seed of the search")
    print("|", " | ".join((*first, *COLUMNS)), "| alarms |")
    print("| --- " * (len(COLUMNS) + 4) + "|")
    if options.photographs is not None:
        for root in options.photographs:
            for backbone in [options.backbone] if options.backbone else ["waterbirds", "fairface"]:
                show(photographs(root, backbone, options.cache))
        return
    for seed in options.seeds:
        for experiment in options.experiments:
            for strength in RATIOS[experiment]:
                if options.strengths is None or strength in options.strengths:
                    show(row_of(experiment, strength, seed, options))


def show(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    cells = [row["experiment"], row["strength"], row["seed"]]
    for column in COLUMNS:
        value = row[column]
        cells.append(f"{value:.3f}" if isinstance(value, float) else "" if value is None else value)
    alarms = f"{row['alarms']} of {row['halves']}" if row["halves"] else ""
    print("|", " | ".join(map(str, cells)), "|", alarms, "|", flush=True)


def row_of(
    experiment: str, strength: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of a split, computed if they are not on disk."""
    settings = HiddenAttributeSettings(seed=seed)
    null = strength == next(iter(RATIOS[experiment]))
    halves = options.halves if null else 0
    sources = sorted(Path(invdiff_pl.environments.__path__[0]).glob("*.py"))
    code = digest_json([asdict(settings), *map(digest_file, sources)])[:8]
    name = f"{experiment}-{strength.replace(':', '_')}-{seed}-{options.images}-{halves}-{code}.json"
    record = options.cache / "rows" / name
    if record.is_file():
        found: dict[str, Any] = read_json(record)
        return found
    features, prompts, attributes = pool_of(experiment, seed, options.cache)
    rows = drawn(prompts, attributes, RATIOS[experiment][strength], options.images, seed)
    split = features[rows], prompts[rows], attributes[rows]
    row = {"experiment": experiment, "strength": strength, "seed": seed}
    row |= figures(*split, settings) | {"halves": halves, "alarms": 0}
    for number in range(halves):
        order = torch.randperm(len(rows), generator=generator(seed, "half", number))
        half = order[: len(rows) // 2]
        candidates = find_hidden_attributes(split[0][half], split[1][half], settings)
        row["alarms"] += any(each.verdict == "bias" for each in candidates)
    write_json(record, row)
    return row


def figures(
    features: Tensor, prompts: Tensor, attributes: Tensor, settings: HiddenAttributeSettings
) -> dict[str, Any]:
    """Measure how well the first candidate matches the attribute; labels are for scoring only."""
    start = time.monotonic()
    candidates = find_hidden_attributes(features, prompts, settings)
    seconds = time.monotonic() - start
    against = conflicting(prompts, attributes)
    first = candidates[0]
    areas = [auc(each.conflict, against) for each in candidates]
    best = None if areas[0] is None else max(range(len(areas)), key=lambda each: areas[each] or 0.0)
    return {
        "auc": areas[0],
        "recall": recall_of(first, prompts, attributes),
        "values": first.memberships.shape[1],
        "evidence": first.evidence,
        "alignment": first.alignment,
        "p_value": first.p_value,
        "verdict": first.verdict,
        "rank": best,  # rank of the best match
        "seconds": seconds,
        "all": [
            {"auc": area, "verdict": each.verdict, "evidence": each.evidence, "gain": each.gain}
            for each, area in zip(candidates, areas, strict=True)
        ],
    }


def recall_of(candidate: HiddenAttribute, prompts: Tensor, attributes: Tensor) -> float | None:
    """Return the lowest recall over prompts of images against the bias, by positive conflict."""
    groups = (candidate.conflict > 0).long()
    return worst_group_precision_recall(groups, prompts, attributes)[1]


def drawn(
    prompts: Tensor, attributes: Tensor, ratio: Sequence[float], count: int, seed: int
) -> Tensor:
    """Draw the rows of a split of ``count`` images, with groups in a ratio, as DataModules do."""
    cells = prompts * (int(attributes.max()) + 1) + attributes
    rows = []
    for cell, part in enumerate(ratio):
        those = (cells == cell).nonzero().squeeze(1)
        wanted = round(count * part / sum(ratio))
        if wanted > len(those):
            raise SystemExit(f"--images={count}: the pool holds {len(those)} of {wanted} images.")
        order = torch.randperm(len(those), generator=generator(seed, "split", cell))
        rows.append(those[order[:wanted]])
    return torch.cat(rows)


def pool_of(experiment: str, seed: int, cache: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, prompts and attributes of a pool, drawn if it is not on disk."""
    file = cache / "pools" / f"{experiment}-{seed}.safetensors"
    if not file.is_file():
        root = cache / "pools" / f"{experiment}-{seed}"
        shutil.rmtree(root, ignore_errors=True)
        paths, prompts, attributes = POOLS[experiment](root, seed)
        features = features_of(paths, f"asset:{experiment}", seed)
        write_tensors(file, {"features": features, "prompts": prompts, "attributes": attributes})
        shutil.rmtree(root)
    pool = read_tensors(file, "delete it")
    return pool["features"], pool["prompts"], pool["attributes"]


def features_of(paths: Sequence[Path], backbone: str, seed: int) -> Tensor:
    """Compute the features of pictures, read and encoded in batches."""
    pipeline = load_pipeline(backbone)
    denoiser = frozen_denoiser(pipeline)

    def latents() -> Any:
        for first in range(0, len(paths), 128):
            pixels = to_float(read_images(paths[first : first + 128], 32))
            with torch.no_grad():
                yield denoiser.latents(encoded_moments(pipeline.vae, pixels))

    return image_features(pipeline, latents(), levels=LEVELS, seed=seed)


Pool = tuple[list[Path], Tensor, Tensor]


def birds(root: Path, seed: int) -> Pool:
    """Draw birds equally often on either background, all splits together."""
    if not (root / "metadata.csv").is_file():
        options = {"correlation": 0.5, "evaluation_correlation": 0.5, "fraction": 0.5}
        render_waterbirds(root, RenderedWaterbirds(**options, seed=seed))
    table = read_table(root / "metadata.csv", ["img_filename", "place"])
    folders = [name.split("/")[0] for name in table["img_filename"]]
    species = torch.tensor([sorted(set(folders)).index(folder) for folder in folders])
    places = torch.from_numpy(check_codes(table["place"], "place", 2, root))
    return [root / name for name in table["img_filename"]], species, places


def faces(root: Path, data: CelebADataModule | FairFaceDataModule) -> Pool:
    """Return the training pictures of a rendered set of faces."""
    labelled = data.read_labelled()
    kept = (torch.from_numpy(labelled.splits) == 0).nonzero().squeeze(1)
    paths = [root / str(labelled.files[row]) for row in kept.tolist()]
    codes = torch.from_numpy(labelled.prompt_ids), torch.from_numpy(labelled.attributes)
    return paths, codes[0][kept], codes[1][kept]


def celeba(root: Path, seed: int) -> Pool:
    """Draw faces, equally many of each hair colour and gender."""
    render_celeba(root, RenderedCelebA(train=1070, val=1, test=1, seed=seed))
    folders = {"root": str(root), "cache_dir": str(root / "cache")}
    return faces(root, CelebADataModule(backbone="asset:celeba", resolution=32, **folders))


def fairface(root: Path, seed: int) -> Pool:
    """Draw faces, equally many of each gender and group of race labels."""
    render_fairface(root, RenderedFairFace(train=700, val=2, seed=seed))
    folders = {"root": str(root), "cache_dir": str(root / "cache")}
    ratio = "1:1:1:1:1:1:1:1"
    return faces(
        root, FairFaceDataModule(backbone="asset:fairface", ratio=ratio, resolution=32, **folders)
    )


def two_biases(strength: str, seed: int, cache: Path) -> None:
    """Print the rows of birds with two biases, with how well each candidate matches either."""
    place, light = map(float, strength.split(":"))
    file = cache / "pools" / f"two-{place}-{light}-{seed}.safetensors"
    if not file.is_file():
        root = file.with_suffix("")
        shutil.rmtree(root, ignore_errors=True)
        biases = {"correlation": place, "tint_correlation": light}
        render_waterbirds(root, RenderedWaterbirds(**biases, fraction=0.5, seed=seed))
        table = read_table(root / "metadata.csv", ["img_filename", "split", "place", "tint"])
        table = table[table["split"].astype(int) == 0]
        folders = [name.split("/")[0] for name in table["img_filename"]]
        species = torch.tensor([sorted(set(folders)).index(folder) for folder in folders])
        read = {
            name: torch.from_numpy(check_codes(table[name], name, 2, root))
            for name in ("place", "tint")
        }
        paths = [root / name for name in table["img_filename"]]
        features = features_of(paths, "asset:waterbirds", seed)
        write_tensors(file, {"features": features, "prompts": species, **read})
        shutil.rmtree(root)
    pool = read_tensors(file, "delete it")
    found = find_hidden_attributes(
        pool["features"], pool["prompts"], HiddenAttributeSettings(seed=seed)
    )
    for number, each in enumerate(found):
        areas = [
            auc(each.conflict, conflicting(pool["prompts"], pool[name]))
            for name in ("place", "tint")
        ]
        cells = [strength, seed, number, each.verdict, f"{each.evidence:.3f}"]
        cells += ["" if area is None else f"{area:.3f}" for area in areas]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


POOLS = {"waterbirds": birds, "celeba": celeba, "fairface": fairface}


def photographs(root: Path, backbone: str, cache: Path) -> dict[str, Any]:
    """Return a folder of photographs' row, for a backbone: an asset's name or a pipeline folder."""
    paths, prompts, attributes = pictures_of(root)
    source = f"asset:{backbone}" if backbone in RATIOS else backbone
    key = digest_json([str(root.resolve()), digest_file(root / "metadata.csv"), source])[:8]
    file = cache / "photographs" / f"{key}.safetensors"
    if not file.is_file():
        write_tensors(file, {"features": features_of(paths, source, 0)})
    features = read_tensors(file, "delete it")["features"]
    row = {"experiment": root.name, "strength": backbone, "seed": 0, "halves": 0, "alarms": 0}
    return row | figures(features, prompts, attributes, HiddenAttributeSettings())


def pictures_of(root: Path) -> Pool:
    """Return the training pictures of a folder that a script of docs/real_photos has built."""
    table = pd.read_csv(root / "metadata.csv", dtype=str)
    if "img_filename" in table:  # Waterbirds' layout, prompted by kind
        table = table.rename(columns={"img_filename": "file_name", "y": "text", "place": "hidden"})
    else:
        table = table.rename(columns={table.columns[3]: "hidden"})
    table = table[table["split"].isin(("0", "train"))]
    codes = [torch.from_numpy(table[name].factorize(sort=True)[0]) for name in ("text", "hidden")]
    return [root / name for name in table["file_name"]], codes[0], codes[1]


if __name__ == "__main__":
    main()
