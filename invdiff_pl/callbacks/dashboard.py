"""A layout that makes TensorBoard's pages of a training run readable."""

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from invdiff_pl.callbacks.data import data_module
from invdiff_pl.utils.tensors import read_tensors


class Dashboard(pl.Callback):
    """Writes a layout of custom scalars and, if there are environments, histograms of their scores.

    The layout groups the parts of the loss, and puts Bias, with its interval, next to Fréchet
    distance and prompt accuracy.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the layout and the histograms."""
        logger = trainer.logger
        if not (trainer.is_global_zero and isinstance(logger, TensorBoardLogger)):
            return
        data = data_module(trainer)
        invariant = data.environments is not None
        logger.experiment.add_custom_scalars(layout(data.attribute, invariant=invariant))
        if data.environments is None:
            return
        file = data.environments / "environments.safetensors"
        found = read_tensors(file, "rerun the environments stage", scores=1, assignments=1)
        writer, scores, assignments = logger.experiment, found["scores"], found["assignments"]
        writer.add_histogram("environments/scores", scores, trainer.global_step)
        for number in assignments.unique().tolist():
            chosen = scores[assignments == number]
            writer.add_histogram(f"environments/scores_of_{number}", chosen, trainer.global_step)


def layout(attribute: str, *, invariant: bool) -> dict[str, dict[str, list[object]]]:
    """Lay out TensorBoard's custom scalars: categories of charts of tags.

    Args:
        attribute: attribute that Bias is about.
        invariant: whether the loss has the parts of the invariant objective.
    """
    parts: dict[str, list[object]] = {
        "risks": ["Multiline", ["train/mean_risk", "train/risk/.*"]],
        "variance of the risks": ["Multiline", ["train/risk_variance"]],
    }
    return {
        "loss": parts if invariant else {"loss": ["Multiline", ["train/loss"]]},
        "bias and quality": {
            f"Bias ({attribute}) with 95 % interval": [
                "Margin",
                [f"bias/{attribute}", *(f"interval/{attribute}_{end}" for end in ("low", "high"))],
            ],
            # A margin of no width: multiline charts leave outliers out of their range, and both
            # of two large values.
            "Fréchet distance": ["Margin", ["val/samples/frechet_distance"] * 3],
            "prompt accuracy, precision, recall": [
                "Multiline",
                [f"val/samples/{name}" for name in ("prompt_accuracy", "precision", "recall")],
            ],
        },
    }
