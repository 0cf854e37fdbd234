"""How a denoiser computes, in any stage: compiled, or in another memory format."""

import os
import shutil

import pytorch_lightning as pl
import torch

from invdiff_pl.modules.common import denoiser_of
from invdiff_pl.utils.errors import InvDiffError


class DenoiserForm(pl.Callback):
    """Speeds up a stage's denoiser; results are equal up to rounding.

    Names of parameters and checkpoints do not change.

    Args:
        compiled: let ``torch.compile`` fuse the denoiser's operations, from its first call on.
        channels_last: hold its weights with the channels innermost, as tensor cores of GPUs take
            convolutions.
    """

    def __init__(self, compiled: bool = False, channels_last: bool = False) -> None:
        self.compiled = compiled
        self.channels_last = channels_last

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the memory format, before ranks lay out their gradients.

        Raises:
            InvDiffError: if the denoiser is to be compiled for the CPU without a C++ compiler.
        """
        compiler = os.environ.get("CXX", "g++")
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self.compiled and on_cpu and not (shutil.which(compiler) or shutil.which("clang++")):
            raise InvDiffError(
                "compiled=true: compiling for the CPU needs a C++ compiler, and "
                f"{compiler} is not there: install it, name another by the environment variable "
                "CXX, or use compiled=false.",
                "compiled",
            )
        if self.channels_last:
            denoiser_of(pl_module).to(memory_format=torch.channels_last)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile the denoiser, once the stage's needs have been measured."""
        if self.compiled:
            denoiser_of(pl_module).compile()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile the denoiser, as :meth:`on_train_start` does."""
        self.on_train_start(trainer, pl_module)

    on_test_start = on_predict_start

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the memory format of files, before the weights are written."""
        if self.channels_last:
            denoiser_of(pl_module).to(memory_format=torch.contiguous_format)
