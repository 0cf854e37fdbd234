"""The Waterbirds DataModule as tests use it."""

from pathlib import Path
from typing import Any

from invdiff_pl.data.waterbirds import WaterbirdsDataModule


def birds_data(root: Path, backbone: Path, cache: Path, **settings: Any) -> WaterbirdsDataModule:
    """The data set of a folder at 32 pixels, in batches of 12 unless told otherwise."""
    chosen = {"batch_size": 12, "resolution": 32, **settings}
    return WaterbirdsDataModule(
        root=str(root), backbone=str(backbone), cache_dir=str(cache), **chosen
    )
