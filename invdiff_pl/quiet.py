"""Library messages that would bury a stage's own: each is known and of no use to the user."""

import logging
import os
import warnings

_WARNINGS = (
    "LightningCLI's args parameter",  # arguments are given on purpose
    "You passed in a `val_dataloader` but have no `validation_step`",  # one DataModule, all stages
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning against newer torch
    "Checkpoint directory .* exists and is not empty",  # continuing there is what is wanted
    "predict returned None",  # environment inference writes its losses itself
    r"Found \d+ module\(s\) in eval mode",  # the frozen backbone
    "The `.*_dataloader.* does not have many workers",  # batches come from memory maps
)


def silence() -> None:
    """Filter known noise and switch off the progress bars of loading; call before running."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Lightning sets its logger's level when it is imported, so only a filter on it stays.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: record.levelno >= logging.WARNING
    )
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
