"""Writing samples to disk."""

from pathlib import Path

import pytorch_lightning as pl

from invdiff_pl.data.samples import MANIFEST, Sample, SampleFolder, manifest_text, sample_file
from invdiff_pl.modules.common import from_all_ranks
from invdiff_pl.modules.conditional_sampler import ConditionalSampler
from invdiff_pl.modules.image_generation import ImageGeneration
from invdiff_pl.utils.files import write_json, write_text

FACTS = "generation.json"


class SaveSamples(pl.Callback):
    """Writes samples as PNG files while they are drawn, and then ``manifest.jsonl``.

    Samples left by an interrupted run are not drawn again. For ``ImageGeneration``, facts about
    what was drawn are written to ``generation.json``, too.

    Args:
        output: folder to write to, created if missing.
    """

    changes_result = True

    def __init__(self, output: str) -> None:
        self.output = output

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module a folder to keep its samples in."""
        assert isinstance(pl_module, ConditionalSampler)
        self._folder = SampleFolder(Path(self.output), pl_module.frozen.resolution)
        pl_module.folder = self._folder

    def on_predict_batch_end(self, *unused: object) -> None:
        """Stop if a file could not be written."""
        self._folder.check()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the last images and write the manifest."""
        assert isinstance(pl_module, ConditionalSampler)
        self._folder.close()
        trainer.strategy.barrier()
        drawn = from_all_ranks(pl_module.drawn, trainer)
        if not trainer.is_global_zero:
            return
        text = manifest_text(_samples(pl_module, drawn))
        write_text(Path(self.output) / MANIFEST, text)
        if isinstance(pl_module, ImageGeneration):
            write_json(Path(self.output) / FACTS, pl_module.facts)

    on_test_batch_end = on_predict_batch_end  # type: ignore[assignment]
    on_test_end = on_predict_end


def _samples(module: ConditionalSampler, drawn: dict[int, str]) -> list[Sample]:
    """Return all samples with what it takes to draw them again, scale by scale."""
    texts = dict.fromkeys([*module.conditions.prompts, *drawn.values()])
    numbers = {text: number for number, text in enumerate(texts)}
    return [
        Sample(
            file=str(sample_file(scale, index)),
            index=index,
            prompt=text,
            prompt_number=numbers[text],
            invariant_scale=scale,
            seed=module.seed,
            guidance_scale=module.guidance_scale,
            steps=module.steps,
            scheduler=type(module.pipeline.scheduler).__name__,
        )
        for scale in module.scales
        for index, text in sorted(drawn.items())
    ]
