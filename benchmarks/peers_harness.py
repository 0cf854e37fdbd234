"""What all methods in the peers' table share: a finished run's backbone, noise and sampler."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_measure import CLOCKS
from torch import Tensor

from invdiff_pl.backbones.pipeline import load_pipeline, sample_images, set_scheduler
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.cli.lightning import build
from invdiff_pl.modules import ConditionalSampler
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_folder


class NotRun(Exception):  # noqa: N818 - no error, a row without figures
    """Raised if a method cannot be run here, with the reason."""


class Harness:
    """A finished run's backbone, data, noise and sampler, which all rows share.

    Args:
        run_dir: folder of a finished run on a data set with labels.
        prompts_run: folder of a finished run from prompts alone, on the same backbone and prompts.
        output: folder of the rows.
        samples_per_prompt: number of samples per prompt; the run's if not given.
        pilot: number of samples per prompt in which clusters are found.
        steps: number of optimizer steps; the run's if not given.
        words: words to put after a prompt for each class of the attribute; the classes' names if
            not given.

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
        self.fit = config_of(run_dir / "tensorboard" / "adapter" / "config.yaml")
        self.predict = config_of(run_dir / "samples" / "config.yaml")
        built = build(["predict", f"--config={self.predict}"])
        assert isinstance(built.model, ConditionalSampler)
        chosen: Any = built.model.hparams
        self.chosen = chosen
        self.data, self.device = built.datamodule, built.trainer.strategy.root_device
        # Wall time on a CPU would say little beside other work.
        self.clock = CLOCKS["cpu" if self.device.type == "cpu" else "wall"]
        self.per_prompt: int = samples_per_prompt or self.data.samples_per_prompt
        self.count = self.per_prompt * len(self.data.prompts)
        self.words = tuple(words or self.data.attribute_names)
        self.conditions: Conditions = self.data.conditions().to(self.device)
        if prompts_run is not None:
            own = build(["fit", f"--config={self.prompts_fit}", "--trainer.logger=false"])
            same = own.model.hparams["backbone"] == self.chosen["backbone"]
            if not same or own.datamodule.prompts != self.data.prompts:
                raise InvDiffError(
                    f"--prompts-run: {prompts_run} is of another backbone or of other prompts than "
                    f"{run_dir}."
                )

    @property
    def prompts_fit(self) -> Path:
        """The resolved settings of the adapter stage, for the run from prompts alone.

        Raises:
            NotRun: if there is no such run.
        """
        if self.prompts_run is None:
            raise NotRun("no --prompts-run was given")
        return config_of(self.prompts_run / "tensorboard" / "adapter" / "config.yaml")

    def identity(self) -> dict[str, Any]:
        """Return what the rows depend on, JSON-serialisable."""
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
        """Return the number of each sample's prompt."""
        return indices // self.per_prompt

    def pipeline(self, backbone: str | None = None) -> Any:
        """Load a new copy of the run's backbone, or of another one, with the run's scheduler."""
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
        """Draw images as the run does, from the same noise."""
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


def config_of(file: Path) -> Path:
    """Return the file of a stage's resolved settings.

    Raises:
        InvDiffError: if it is missing.
    """
    if not file.is_file():
        raise InvDiffError(f"{file} is missing: finish the run first (`make train`).")
    return file
