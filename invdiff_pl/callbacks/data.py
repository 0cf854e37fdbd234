"""The DataModule that a callback works on."""

import pytorch_lightning as pl

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.utils.errors import InvDiffError


def data_module(trainer: pl.Trainer) -> BiasedDataModule:
    """Return the DataModule of the data set that a trainer runs on.

    Raises:
        ValueError: if the trainer was given a loader instead, or another kind of DataModule.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, BiasedDataModule):
        raise InvDiffError(
            "the callbacks that score samples or estimate resources need a data set: run on "
            "a BiasedDataModule, such as TableDataModule, or leave them out."
        )
    return data
