"""What training leaves behind on disk."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from invdiff_pl.modules.invariant_adapter import UNTRAINED, InvariantAdapter
from invdiff_pl.utils.files import atomic_path


class SaveAdapter(pl.Callback):
    """Writes the trained adapter into the folder ``adapter`` of ``output``.

    Must come after the callbacks that choose or change the weights.

    Args:
        output: folder, created where it is missing.
    """

    changes_result = True

    def __init__(self, output: str) -> None:
        self.output = output

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it: averaged, or an earlier one, if callbacks put that in place."""
        assert isinstance(pl_module, InvariantAdapter)
        if not trainer.is_global_zero:
            return
        facts: dict[str, Any] = {
            "trained": pl_module.trains,
            "architecture": pl_module.frozen.architecture,
            "candidates": list(pl_module.environments.candidates),
        }
        if pl_module.withheld is not None:
            facts["reason"] = UNTRAINED.format(why=pl_module.withheld)
        Path(self.output).mkdir(parents=True, exist_ok=True)
        with atomic_path(Path(self.output) / "adapter") as partial:
            pl_module.adapter.save(partial, **facts)
