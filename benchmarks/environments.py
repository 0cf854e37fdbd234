"""Which scores and partitions find the images that go against the bias, and how strong it must be.

    python benchmarks/environments.py [--experiments …] [--seeds 0 1 2] [--resamplings 0]
    python benchmarks/environments.py --runs runs/waterbirds/mini runs/celeba/mini

Draws each rendered data set at several strengths of bias, scores its training images with the
shipped backbone (``--fine-tune STEPS`` first trains it on that very split, as a user has done),
and prints AUC for bias-conflicting images and worst-group recall of every score, and of every
partition of the default score. ``--resamplings N`` also draws N random halves of each data set's
images and counts in how many a bias is found; halves overlap, so take as many images as the pool
holds (``--images 8800`` of CelebA's faces at equal ratios). Results are kept in
``.cache/environments-bench``; losses are reused, figures by the same code only. ``--runs`` takes
the losses of finished runs instead.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

import invdiff_pl.environments
from invdiff_pl.backbones.draws import generator
from invdiff_pl.cli.lightning import build, data_module
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.environments.assignment import assign
from invdiff_pl.environments.evidence import weigh
from invdiff_pl.environments.quality import auc, conflicting, worst_group_precision_recall
from invdiff_pl.environments.refine import by_group
from invdiff_pl.environments.scores import (
    SCORES,
    Losses,
    attribute_scores,
    score,
    standardise,
)
from invdiff_pl.utils.files import digest_file, digest_json, read_json, write_json
from invdiff_pl.utils.names import PARTITIONS
from invdiff_pl.utils.tensors import read_tensors

CACHE = Path(".cache/environments-bench")


class Setting(NamedTuple):
    """A data set at a strength of bias.

    Attributes:
        experiment: file in ``experiments/``.
        name: of the strength.
        render: flags of ``render``, where the pictures must be drawn for it.
        flags: of the DataModule.
        null: whether there is no bias.
    """

    experiment: str
    name: str
    render: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    null: bool = False


SETTINGS = (
    *(
        Setting("waterbirds", str(c), (f"--correlation={c}",), null=c == 0.5)
        for c in (0.5, 0.7, 0.9, 0.95, 0.99)
    ),
    *(
        Setting("celeba", r, flags=(f"--data.ratio={r}",), null=r == "1:1:1:1")
        for r in ("1:1:1:1", "1:2:2:1", "1:4:4:1", "1:8:8:1")
    ),
    *(
        Setting("fairface", r, flags=(f"--data.ratio={r}",), null=r == "1:1:1:1:1:1:1:1")
        for r in ("1:1:1:1:1:1:1:1", "3:2:1:1:1:1:2:3", "8:4:1:1:1:1:4:8")
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    add_loss_flags(parser)
    parser.add_argument("--resamplings", type=int, default=0)
    parser.add_argument("--runs", nargs="+", type=Path, help="finished runs, scored already")
    options = parser.parse_args(arguments)
    if options.runs:
        print_tables([of_run(run_dir, options.resamplings) for run_dir in options.runs])
        return
    rows = []
    for setting in chosen(options):
        for seed in options.seeds:
            rows.append(measured(setting, seed, options))
            print_tables(rows)


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that name losses: of which data sets, seeds and backbones, and how made."""
    parser.add_argument("--experiments", nargs="+", default=["waterbirds", "celeba", "fairface"])
    parser.add_argument("--strengths", nargs="+", help="names of strengths; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fine-tune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--images", type=int, default=4800, help="of each training split")
    parser.add_argument("--own-draws", type=int, default=2, help="of 8, under the own prompt")
    parser.add_argument("--precision", default="32-true", help="of forward passes and fine-tuning")


def chosen(options: argparse.Namespace) -> list[Setting]:
    """The settings that the flags name."""
    return [
        setting
        for setting in SETTINGS
        if setting.experiment in options.experiments
        and (options.strengths is None or setting.name in options.strengths)
    ]


def measured(setting: Setting, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a setting and seed, computed if they are not on disk."""
    sources = sorted(Path(invdiff_pl.environments.__path__[0]).glob("*.py"))
    code = digest_json([digest_file(source) for source in sources])[:8]
    record = CACHE / f"{losses_name(setting, seed, options)}-{options.resamplings}-{code}.json"
    if record.is_file():
        found: dict[str, Any] = read_json(record)
        return found
    losses, prompts, attributes = losses_and_labels(setting, seed, options)
    figures = figures_of(losses, prompts, attributes, seed, options.resamplings)
    result = {"experiment": setting.experiment, "strength": setting.name, "seed": seed}
    write_json(record, result | {"null": setting.null} | figures)
    return result | {"null": setting.null} | figures


def data_name(setting: Setting) -> str:
    """Folder of a setting's data set and backbone."""
    return f"{setting.experiment}-{setting.name.replace(':', '_')}"


def losses_name(setting: Setting, seed: int, options: argparse.Namespace) -> str:
    """Folder of a setting's losses."""
    scored = f"{options.fine_tune}-{options.images}-{options.own_draws}-{options.precision}"
    return f"{data_name(setting)}-seed{seed}-{scored}"


def losses_and_labels(
    setting: Setting, seed: int, options: argparse.Namespace
) -> tuple[Losses, Tensor, Tensor]:
    """Losses, prompts and attributes of a setting's training images, made if not on disk."""
    flags = prepared(setting, CACHE / data_name(setting), options)
    losses = losses_of(flags, CACHE / losses_name(setting, seed, options), seed, options)
    prompts, attributes = data_module(flags).labels("train")
    assert attributes is not None
    return losses, prompts, attributes


def losses_of(flags: list[str], output: Path, seed: int, options: argparse.Namespace) -> Losses:
    """The losses of the training images, scored if they are not on disk."""
    file = output / "environments.safetensors"
    if not file.is_file():
        stage = "--config=experiments/stages/environments.yaml"
        predict = [*flags, stage, f"--seed_everything={seed}", f"--data.seed={seed}"]
        predict += [f"--model.output={output}", f"--model.own_draws={options.own_draws}"]
        precision = f"--trainer.precision={options.precision}"
        run(["predict", *predict, precision, "--trainer.callbacks=[]"])
    tensors = read_tensors(file, "delete it")
    return Losses(tensors["losses"], tensors["null_losses"])


def of_run(run_dir: Path, resamplings: int) -> dict[str, Any]:
    """The figures of a finished run, from the losses that its environment stage left."""
    # With all flags that the run was given, such as the ratio of its split.
    config = run_dir / "environments" / "config.yaml"
    settings = OmegaConf.load(config)
    name, seed = settings.experiment.name, settings.seed_everything
    ratio = settings.data.init_args.get("ratio")
    data = build(["predict", f"--config={config}", "--trainer.logger=false"]).datamodule
    assert isinstance(data, BiasedDataModule)
    prompts, attributes = data.labels("train")
    assert attributes is not None
    tensors = read_tensors(run_dir / "environments" / "environments.safetensors", "rerun")
    losses = Losses(tensors["losses"], tensors["null_losses"])
    figures = figures_of(losses, prompts, attributes, seed, resamplings)
    told = {"experiment": name, "strength": ratio or "as drawn", "seed": seed, "null": False}
    return told | figures


def prepared(setting: Setting, run_dir: Path, options: argparse.Namespace) -> list[str]:
    """Draw the data set, fine-tune the backbone if asked for; the flags that name both."""
    if not (run_dir / "data" / "images").is_dir():
        words = ["--run-dir", str(run_dir), "--experiment", setting.experiment]
        run(["render", *words, *setting.render])
    files = [f"experiments/{setting.experiment}.yaml", "experiments/base.yaml"]
    flags = [f"--config={file}" for file in [*files, "experiments/scales/mini.yaml"]]
    flags += [f"--experiment.run_dir={run_dir}", *setting.flags]
    if setting.flags:  # drawn by ratio
        flags.append(f"--scale.train_size={options.images}")
    if options.fine_tune:
        asset = f"asset:{setting.experiment}"
        pipeline = run_dir / f"backbone-{options.fine_tune}" / "pipeline"
        if not pipeline.is_dir():
            stage = ["--config=experiments/stages/backbone.yaml", f"--experiment.start={asset}"]
            steps = f"--trainer.max_steps={options.fine_tune}"
            output = f"--model.output={pipeline.parent}"
            precision = f"--trainer.precision={options.precision}"
            run(["fit", *flags, *stage, steps, output, precision, "--model.learning_rate=0.0003"])
        flags.append(f"--experiment.backbone={pipeline}")
    return flags


def run(words: Sequence[str]) -> None:
    """One ``invdiff`` command, visibly."""
    print("python -m invdiff_pl", *words, flush=True)
    subprocess.run([sys.executable, "-m", "invdiff_pl", *words], check=True)


def figures_of(
    losses: Losses, prompts: Tensor, attributes: Tensor, seed: int, resamplings: int
) -> dict[str, Any]:
    """AUC and worst-group recall of every score and partition; verdicts on subsamples."""
    positives = conflicting(prompts, attributes)
    found, refined = attribute_scores(losses, prompts)
    pursued = by_group(refined.scores, prompts)
    scores = {name: pursued if name == "prompt_pursuit" else score(losses, prompts, name)
              for name in SCORES}  # fmt: skip

    def told(values: Tensor, method: str = "exact") -> dict[str, Any]:
        table = standardise(losses.null, prompts).flatten(1)
        groups = assign(values, prompts, method=method, table=table, seed=seed).assignments
        precision, recall = worst_group_precision_recall(groups, prompts, attributes)
        return {"auc": auc(values, positives), "precision": precision, "recall": recall}

    verdicts = []
    for number in range(resamplings):
        order = torch.randperm(len(prompts), generator=generator(seed, "resampling", number))
        rows = order[: len(prompts) // 2]
        part = Losses(losses.own[rows], losses.null[rows])
        verdicts.append(weigh(*attribute_scores(part, prompts[rows]), prompts[rows]).bias_found)
    return {
        "evidence": weigh(found, refined, prompts).to_json(),
        "scores": {name: told(values) for name, values in scores.items()},
        "partitions": {method: told(pursued, method) for method in PARTITIONS},
        "bias_found": verdicts.count(True),
        "resamplings": resamplings,
    }


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Markdown: a row a data set, strength and seed; a column a score or partition."""
    for part in ("scores", "partitions"):
        names = list(rows[0][part])
        print("\n| data set | strength | seed | bias found |", " | ".join(names), "|")
        print("| --- " * (4 + len(names)) + "|")
        for row in rows:
            verdict = "yes" if row["evidence"]["bias_found"] else "no"
            if row["resamplings"]:
                verdict += f" ({row['bias_found']} of {row['resamplings']})"
            cells = [row["experiment"], row["strength"], str(row["seed"]), verdict]
            for name in names:
                area, recall = row[part][name]["auc"], row[part][name]["recall"]
                cells.append("" if row["null"] or area is None else f"{area:.3f} / {recall:.2f}")
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
