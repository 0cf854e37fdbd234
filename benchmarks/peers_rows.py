"""The rows of the peers' table: what each method does with a finished run's backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from ablation import train_adapter
from ablation_groups import write_groups
from ablation_rows import ROWS, Row
from cluster_guidance import Guide, Readings, find_clusters
from peers_harness import Harness, NotRun
from torch import Tensor

from invdiff_pl.adapters import load_adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.callbacks import ExponentialMovingAverage, SavePipeline
from invdiff_pl.cli.lightning import build
from invdiff_pl.modules import Backbone
from invdiff_pl.utils.files import read_json, write_json

# Learning rate at which the small backbones are fine-tuned on another split.
FINE_TUNING_RATE = 3e-4
STRENGTHS = (0.05, 0.2, 0.8)
NOTHING, WORDS, PROMPTS, DATA, LABELS = (
    "nothing",
    "words of the attribute",
    "prompts",
    "a data set",
    "a data set and labels",
)

Images = Callable[[Tensor], Tensor]


@dataclass
class Made:
    """A method, ready to draw.

    Attributes:
        images: function from global sample indices to images, uint8 ``[B, 3, H, W]``.
        facts: what it took, JSON-serialisable.
        stock: whether it draws like the backbone alone.
    """

    images: Images
    facts: dict[str, Any] = field(default_factory=dict)
    stock: bool = False


def nothing(harness: Harness, folder: Path) -> Made:
    """Return the backbone alone."""
    return Made(partial(harness.images, harness.pipeline()), stock=True)


def rewriting(harness: Harness, folder: Path) -> Made:
    """Return the backbone with a class of the attribute put after the prompt, in turn."""
    pipeline = harness.pipeline()
    if missing := unknown_words(pipeline.tokenizer, harness.words):
        raise NotRun(
            f"the tokenizer has no token for {', '.join(map(repr, missing))}; it would spell "
            "them in letters, which mean nothing to this model"
        )
    texts = [f"{prompt} {word}" for prompt in harness.data.prompts for word in harness.words]
    rewritten = Conditions(frozen_denoiser(pipeline).condition(texts)).to(harness.device)

    def images(indices: Tensor) -> Tensor:
        places = indices % harness.per_prompt % len(harness.words)
        rows = harness.prompts(indices) * len(harness.words) + places
        return harness.images(pipeline, indices, rewritten[rows])

    return Made(images)


def guided(harness: Harness, strength: float) -> Made:
    """Return the backbone with guidance by clusters of the middle block."""
    readings, seconds = _clusters(harness)
    pipeline = harness.pipeline()
    denoiser = frozen_denoiser(pipeline, harness.chosen.resolution)

    def images(indices: Tensor) -> Tensor:
        prompts = harness.prompts(indices)
        condition = harness.conditions[prompts]
        assigned = readings.assigned(prompts, indices % harness.per_prompt)
        guide = Guide(denoiser, readings, strength, condition, prompts, assigned)
        return harness.images(pipeline, indices, condition, callback_on_step_end=guide)

    clusters = [[round(share, 3) for share in row if share] for row in readings.shares.tolist()]
    return Made(images, {"seconds": seconds, "clusters": clusters})


@cache
def _clusters(harness: Harness) -> tuple[Readings, float]:
    started = harness.clock()
    readings = find_clusters(
        harness.pipeline(),
        harness.conditions,
        per_prompt=harness.pilot,
        seed=harness.chosen.seed,
        steps=harness.chosen.steps,
        guidance_scale=harness.chosen.guidance_scale,
        batch_size=harness.data.batch_size,
    )
    return readings, round(harness.clock() - started, 1)


def trained(harness: Harness, folder: Path, row: Row, on_prompts: bool = False) -> Made:
    """Return an adapter trained as in a row of the ablation, on either run's images."""
    config = harness.prompts_fit if on_prompts else harness.fit
    place = harness.output / "environments" / ("prompts" if on_prompts else "data")

    def train() -> dict[str, Any]:
        groups = write_groups(row.groups, config, place, harness.chosen.seed)
        told = train_adapter(row, config, groups, folder, steps=harness.steps)
        seconds = told["cpu_seconds" if harness.device.type == "cpu" else "seconds"]
        return {**told["adapter"], "seconds": seconds}

    return _adapted(harness, folder / "adapter", _once(folder / "trained.json", train))


def finished(harness: Harness, folder: Path, on_prompts: bool = False) -> Made:
    """Return the adapter of either run itself."""
    run = harness.prompts_fit.parents[2] if on_prompts else harness.run_dir
    facts = read_json(run / "adapter" / "adapter" / "adapter.json")
    stages = ("data", "environments") if on_prompts else ("environments",)
    before, training = (
        sum(read_json(run / stage / "stage.json")["seconds"] for stage in names)
        for names in (stages, ("adapter",))
    )
    facts |= {"wall_seconds": training, "wall_seconds_before": round(before, 1)}
    return _adapted(harness, run / "adapter" / "adapter", facts)


def _adapted(harness: Harness, adapter: Path, facts: dict[str, Any]) -> Made:
    pipeline = harness.pipeline()
    attached = load_adapter(adapter, frozen_denoiser(pipeline).network)
    attached.prepare_sampling(pipeline, 1.0)
    kept = ("seconds", "wall_seconds", "wall_seconds_before", "parameters", "share")
    told = {name: facts[name] for name in kept if name in facts}
    return Made(partial(harness.images, pipeline), told)


def fine_tuned(harness: Harness, folder: Path) -> Made:
    """Return the backbone fine-tuned as a whole, on batches balanced over prompt and label."""
    facts = _once(folder / "trained.json", lambda: _fine_tune(harness, folder))
    return Made(partial(harness.images, harness.pipeline(str(folder / "pipeline"))), facts)


def _fine_tune(harness: Harness, folder: Path) -> dict[str, Any]:
    groups = write_groups(
        "oracle", harness.fit, harness.output / "environments" / "data", harness.chosen.seed
    )
    flags = [
        f"--data.environments={groups}",
        "--data.batches=balanced",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
    ]
    if harness.steps:
        flags.append(f"--trainer.max_steps={harness.steps}")
    built = build(["fit", f"--config={harness.fit}", *flags])
    averaging = [c for c in built.trainer.callbacks if isinstance(c, ExponentialMovingAverage)]  # type: ignore[attr-defined]
    built.trainer.callbacks = [*averaging, SavePipeline(str(folder))]  # type: ignore[attr-defined]
    backbone = Backbone(
        harness.chosen.backbone,
        learning_rate=FINE_TUNING_RATE,
        warmup_steps=int(built.model.hparams["warmup_steps"]),
        seed=harness.chosen.seed,
    )
    started = harness.clock()
    built.trainer.fit(backbone, datamodule=built.datamodule)
    size = sum(weight.numel() for weight in backbone.trainable_parameters().values())
    seconds = round(harness.clock() - started, 1)
    return {"seconds": seconds, "parameters": size, "share": 1.0}


@dataclass(frozen=True)
class Peer:
    """A row of the peers' table.

    Attributes:
        name: name of the row, for ``--rows``.
        says: description in the table.
        needs: what it needs besides the model and the prompts that are drawn.
        make: function that makes the method from a harness and a folder for what is trained.
    """

    name: str
    says: str
    needs: str
    make: Callable[[Harness, Path], Made]


def _trained(name: str) -> Callable[[Harness, Path], Made]:
    return lambda harness, folder: trained(harness, folder, ROWS[name])


_REWEIGHTED = Row("self_reweighted", "", model={"lambda_": 0.0})
PEERS = {
    peer.name: peer
    for peer in (
        Peer("nothing", "nothing: the backbone", NOTHING, nothing),
        Peer("rewriting", "prompt rewriting", WORDS, rewriting),
        *(
            Peer(
                f"clusters_{strength:g}",
                f"guidance by clusters of the middle block, strength {strength:g}",
                NOTHING,
                lambda harness, folder, strength=strength: guided(harness, strength),  # type: ignore[misc]
            )
            for strength in STRENGTHS
        ),
        Peer(
            "self_reweighted",
            "its own images, reweighted by inferred environments, no penalty",
            PROMPTS,
            lambda harness, folder: trained(harness, folder, _REWEIGHTED, on_prompts=True),
        ),
        Peer(
            "ours_prompts",
            "**ours, from prompts alone**",
            PROMPTS,
            lambda harness, folder: finished(harness, folder, on_prompts=True),
        ),
        Peer("reference", "the paper's recipe", DATA, _trained("reference")),
        Peer("ours", "**ours, with the data set**", DATA, finished),
        Peer("oracle", "ours, environments by attribute value", LABELS, _trained("oracle")),
        Peer(
            "oracle_minority",
            "ours, environments with and against the bias",
            LABELS,
            _trained("oracle_minority"),
        ),
        Peer(
            "fine_tuned",
            "every weight fine-tuned on balanced batches",
            LABELS,
            fine_tuned,
        ),
    )
}


def unknown_words(tokenizer: Any, phrases: Sequence[str]) -> list[str]:
    """Return the words that a tokenizer has no token for, in order.

    The shipped backbones' tokenizers know the words of their prompts, with one token each.
    """
    words = dict.fromkeys(word for phrase in phrases for word in phrase.split())
    return [word for word in words if len(tokenizer.tokenize(word)) != 1]


def _once(record: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is on record, making and recording it first if there is none."""
    if not record.is_file():
        write_json(record, make())
    return dict(read_json(record))
