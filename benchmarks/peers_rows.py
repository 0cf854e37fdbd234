"""The rows of the peers' table: what each method makes of a finished run's backbone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ablation import train_adapter
from ablation_groups import write_groups
from ablation_rows import ROWS, Row
from cluster_guidance import Guide, Readings, find_clusters
from torch import Tensor

from invdiff_pl.adapters import load_adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import load_pipeline, sample_images, set_scheduler
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.callbacks import ExponentialMovingAverage
from invdiff_pl.cli.lightning import build
from invdiff_pl.modules import Backbone, ConditionalSampler
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_folder, read_json, write_json

# At which the small backbones are fine-tuned on another split.
FINE_TUNING_RATE = 3e-4
STRENGTHS = (0.1, 0.2, 0.4)
NOTHING, WORDS, PROMPTS, DATA, LABELS = (
    "nothing",
    "words of the attribute",
    "prompts",
    "a data set",
    "a data set and labels",
)

Images = Callable[[Tensor], Tensor]


class NotRun(Exception):  # noqa: N818 - no error, a row without figures
    """Why a method cannot be run here."""


@dataclass
class Made:
    """A method, ready to draw.

    Attributes:
        images: of global sample indices, uint8 ``[B, 3, H, W]``.
        facts: what it took, JSON-ready.
        stock: whether it draws as the backbone alone does.
    """

    images: Images
    facts: dict[str, Any] = field(default_factory=dict)
    stock: bool = False


class Harness:
    """A finished run's backbone, data, noises and sampler, which all rows share.

    Args:
        run_dir: finished run on a data set with labels.
        prompts_run: finished run from prompts alone, on the same backbone and prompts.
        output: folder of the rows.
        samples_per_prompt: the run's if not given.
        pilot: samples of each prompt that clusters are found in.
        steps: of optimizers; the run's if not given.
        words: of each class of the attribute, to be put after a prompt; the classes' names if not
            given.

    Raises:
        InvDiffError: if a run is not finished, or they differ in backbone or prompts.
    """

    def __init__(
        self,
        run_dir: Path,
        prompts_run: Path | None,
        output: Path,
        *,
        samples_per_prompt: int | None = None,
        pilot: int = 256,
        steps: int | None = None,
        words: Sequence[str] | None = None,
    ) -> None:
        self.run_dir, self.prompts_run, self.output = run_dir, prompts_run, output
        self.pilot, self.steps = pilot, steps
        self.fit = _config(run_dir / "tensorboard" / "adapter" / "config.yaml")
        self.predict = _config(run_dir / "samples" / "config.yaml")
        built = build(["predict", f"--config={self.predict}"])
        assert isinstance(built.model, ConditionalSampler)
        self.chosen: Any = built.model.hparams
        self.data, self.device = built.datamodule, built.trainer.strategy.root_device  # type: ignore[attr-defined]
        self.per_prompt: int = samples_per_prompt or self.data.samples_per_prompt
        self.count = self.per_prompt * len(self.data.prompts)
        self.words = tuple(words or self.data.attribute_names)
        self.conditions: Conditions = self.data.conditions().to(self.device)
        if prompts_run is not None:
            own = build(["fit", f"--config={self._prompts_fit}", "--trainer.logger=false"])
            same = own.model.hparams["backbone"] == self.chosen.backbone
            if not same or own.datamodule.prompts != self.data.prompts:
                raise InvDiffError(
                    f"--prompts-run: {prompts_run} is of another backbone or of other prompts than "
                    f"{run_dir}."
                )

    @property
    def _prompts_fit(self) -> Path:
        if self.prompts_run is None:
            raise NotRun("no --prompts-run was given")
        return _config(self.prompts_run / "tensorboard" / "adapter" / "config.yaml")

    def identity(self) -> dict[str, Any]:
        """What the rows depend on, JSON-ready."""
        runs = [run for run in (self.run_dir, self.prompts_run) if run is not None]
        return {
            "predict": self.predict.read_text(encoding="utf-8"),
            "runs": [digest_folder(run / "adapter" / "adapter") for run in runs],
            "samples_per_prompt": self.per_prompt,
            "pilot": self.pilot,
            "steps": self.steps,
            "words": self.words,
        }

    def prompts(self, indices: Tensor) -> Tensor:
        """Number of each sample's prompt."""
        return indices // self.per_prompt

    def pipeline(self, backbone: str | None = None) -> Any:
        """A new copy of the run's backbone, or of another one, with the run's scheduler."""
        found = load_pipeline(backbone or self.chosen.backbone)
        set_scheduler(found, self.chosen.scheduler)
        return found.to(self.device)

    def images(
        self,
        pipeline: Any,
        indices: Tensor,
        condition: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Images as the run draws them, of its own noises."""
        return sample_images(
            pipeline,
            condition or self.conditions[self.prompts(indices)],
            self.conditions.null,
            indices.tolist(),
            seed=self.chosen.seed,
            steps=self.chosen.steps,
            guidance_scale=self.chosen.guidance_scale,
            resolution=self.chosen.resolution,
            **options,
        )

    # Methods, a row each.

    def nothing(self, folder: Path) -> Made:
        """The backbone alone."""
        return Made(partial(self.images, self.pipeline()), stock=True)

    def rewriting(self, folder: Path) -> Made:
        """A class of the attribute is put after the prompt, in turn."""
        pipeline = self.pipeline()
        if missing := unknown_words(pipeline.tokenizer, self.words):
            raise NotRun(
                f"the tokenizer has no token for {', '.join(map(repr, missing))}; it would spell "
                "them in letters, which mean nothing to this model"
            )
        texts = [f"{prompt} {word}" for prompt in self.data.prompts for word in self.words]
        rewritten = Conditions(frozen_denoiser(pipeline).condition(texts)).to(self.device)

        def images(indices: Tensor) -> Tensor:
            places = indices % self.per_prompt % len(self.words)
            rows = self.prompts(indices) * len(self.words) + places
            return self.images(pipeline, indices, rewritten[rows])

        return Made(images)

    def guided(self, strength: float, folder: Path) -> Made:
        """Guidance by clusters of the middle block."""
        readings, seconds = self._clusters
        pipeline = self.pipeline()
        denoiser = frozen_denoiser(pipeline, self.chosen.resolution)

        def images(indices: Tensor) -> Tensor:
            prompts = self.prompts(indices)
            condition = self.conditions[prompts]
            assigned = readings.assigned(prompts, indices % self.per_prompt)
            guide = Guide(denoiser, readings, strength, condition, prompts, assigned)
            return self.images(pipeline, indices, condition, callback_on_step_end=guide)

        clusters = [[round(share, 3) for share in row if share] for row in readings.shares.tolist()]
        return Made(images, {"seconds": seconds, "clusters": clusters})

    @cached_property
    def _clusters(self) -> tuple[Readings, float]:
        started = time.monotonic()
        readings = find_clusters(
            self.pipeline(),
            self.conditions,
            per_prompt=self.pilot,
            seed=self.chosen.seed,
            steps=self.chosen.steps,
            guidance_scale=self.chosen.guidance_scale,
            batch_size=self.data.batch_size,
        )
        return readings, round(time.monotonic() - started, 1)

    def trained(self, row: Row, folder: Path, on_prompts: bool = False) -> Made:
        """An adapter trained as a row of the ablation says, on either run's images."""
        config = self._prompts_fit if on_prompts else self.fit
        place = self.output / "environments" / ("prompts" if on_prompts else "data")

        def train() -> dict[str, Any]:
            groups = write_groups(row.groups, config, place, self.chosen.seed)
            return train_adapter(row, config, groups, folder, steps=self.steps)

        facts = _once(folder / "trained.json", train)
        return self._adapted(folder / "adapter", {**facts, **facts["adapter"]})

    def finished(self, folder: Path, on_prompts: bool = False) -> Made:
        """The adapter of either run itself."""
        run = self._prompts_fit.parents[2] if on_prompts else self.run_dir
        facts = read_json(run / "adapter" / "adapter" / "adapter.json")
        stages = ("data", "environments") if on_prompts else ("environments",)
        before, training = (
            sum(read_json(run / stage / "stage.json")["seconds"] for stage in names)
            for names in (stages, ("adapter",))
        )
        facts |= {"seconds": training, "seconds_before": round(before, 1)}
        return self._adapted(run / "adapter" / "adapter", facts)

    def _adapted(self, adapter: Path, facts: dict[str, Any]) -> Made:
        pipeline = self.pipeline()
        attached = load_adapter(adapter, frozen_denoiser(pipeline).network)
        attached.prepare_sampling(pipeline, 1.0)
        kept = ("seconds", "seconds_before", "parameters", "share")
        told = {name: facts[name] for name in kept if name in facts}
        return Made(partial(self.images, pipeline), told)

    def fine_tuned(self, folder: Path) -> Made:
        """Every weight trained further, on batches balanced over prompt and label."""
        facts = _once(folder / "trained.json", lambda: self._fine_tune(folder))
        return Made(partial(self.images, self.pipeline(str(folder / "pipeline"))), facts)

    def _fine_tune(self, folder: Path) -> dict[str, Any]:
        groups = write_groups(
            "oracle", self.fit, self.output / "environments" / "data", self.chosen.seed
        )
        flags = [
            f"--data.environments={groups}",
            "--data.batches=balanced",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={folder}",
        ]
        if self.steps:
            flags.append(f"--trainer.max_steps={self.steps}")
        built = build(["fit", f"--config={self.fit}", *flags])
        averaging = [
            callback
            for callback in built.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, ExponentialMovingAverage)
        ]
        built.trainer.callbacks = averaging  # type: ignore[attr-defined]
        backbone = Backbone(
            self.chosen.backbone,
            str(folder),
            learning_rate=FINE_TUNING_RATE,
            warmup_steps=int(built.model.hparams["warmup_steps"]),
            half_precision=False,
            seed=self.chosen.seed,
        )
        started = time.monotonic()
        built.trainer.fit(backbone, datamodule=built.datamodule)
        size = sum(weight.numel() for weight in backbone.trainable_parameters().values())
        seconds = round(time.monotonic() - started, 1)
        return {"seconds": seconds, "parameters": size, "share": 1.0}


@dataclass(frozen=True)
class Peer:
    """A row.

    Attributes:
        name: for ``--rows``.
        says: for the table.
        needs: beside the model and the prompts that are drawn.
        make: of a harness and a folder for what is trained.
    """

    name: str
    says: str
    needs: str
    make: Callable[[Harness, Path], Made]


def _trained(name: str) -> Callable[[Harness, Path], Made]:
    return lambda harness, folder: harness.trained(ROWS[name], folder)


_REWEIGHTED = Row("self_reweighted", "", model={"lambda_": 0.0})
PEERS = {
    peer.name: peer
    for peer in (
        Peer("nothing", "nothing: the backbone", NOTHING, Harness.nothing),
        Peer("rewriting", "prompt rewriting", WORDS, Harness.rewriting),
        *(
            Peer(
                f"clusters_{strength:g}",
                f"guidance by clusters of the middle block, strength {strength:g}",
                NOTHING,
                lambda harness, folder, strength=strength: harness.guided(strength, folder),  # type: ignore[misc]
            )
            for strength in STRENGTHS
        ),
        Peer(
            "self_reweighted",
            "its own images, reweighted by inferred environments, no penalty",
            PROMPTS,
            lambda harness, folder: harness.trained(_REWEIGHTED, folder, on_prompts=True),
        ),
        Peer(
            "ours_prompts",
            "**ours, from prompts alone**",
            PROMPTS,
            lambda harness, folder: harness.finished(folder, on_prompts=True),
        ),
        Peer("reference", "the paper's recipe", DATA, _trained("reference")),
        Peer("ours", "**ours, with the data set**", DATA, Harness.finished),
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
            Harness.fine_tuned,
        ),
    )
}


def unknown_words(tokenizer: Any, phrases: Sequence[str]) -> list[str]:
    """Words that a tokenizer has no token for, in order.

    The shipped backbones' tokenizers know the words of their prompts, a token each.
    """
    words = dict.fromkeys(word for phrase in phrases for word in phrase.split())
    return [word for word in words if len(tokenizer.tokenize(word)) != 1]


def _config(file: Path) -> Path:
    if not file.is_file():
        raise InvDiffError(f"{file} is missing: finish the run first (`make train`).")
    return file


def _once(record: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was made and recorded, or is now."""
    if not record.is_file():
        write_json(record, make())
    return dict(read_json(record))
