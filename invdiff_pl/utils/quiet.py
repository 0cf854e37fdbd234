"""Silencing library messages that would bury a stage's own and are of no use to the user."""

import io
import logging
import os
import sys
import threading
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
    # Lightning sets its logger's level when it is imported, so only a filter lasts.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: record.levelno >= logging.WARNING
    )
    # "Seed set to", for every stage whose flags are checked; the command line prints the seed.
    logging.getLogger("lightning_fabric.utilities.seed").setLevel(logging.WARNING)
    threading.excepthook = _tell_thread_error
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def write_what_can_be_encoded() -> None:
    """Print ``?`` for letters that the terminal's encoding lacks, rather than fail on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _tell_thread_error(failed: threading.ExceptHookArgs) -> None:
    """Print in one line the system error that stopped a thread, such as TensorBoard's writer.

    TensorBoard raises the same error in the main thread, which ends the stage.
    """
    if isinstance(failed.exc_value, OSError):
        reason = failed.exc_value.strerror or str(failed.exc_value)
        print(f"warning: a background thread stopped: {reason}", file=sys.stderr)
    else:
        threading.__excepthook__(failed)
