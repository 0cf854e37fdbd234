"""A trainer as tests use it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.strategies import DDPStrategy

from invdiff_pl.callbacks import SaveAdapter, SaveEnvironments, SaveSamples
from invdiff_pl.modules import ConditionalSampler, EnvironmentInference

# Of the inference, so that it takes a second.
QUICK: dict[str, Any] = {"starts": 4, "values": [], "components": 6, "alpha": 0.5, "resamples": 1}


def quiet_trainer(folder: Path, ranks: int = 1, **settings: Any) -> Trainer:
    """A trainer on so many CPU processes that neither logs, saves nor prints unless told to."""
    # Forked: nothing is imported anew.
    several = DDPStrategy(process_group_backend="gloo", start_method="fork")
    chosen = {"logger": False, "enable_checkpointing": False, **settings}
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=several if ranks > 1 else "auto",
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **chosen,
    )


def infer(
    backbone: Path, folder: Path, data: LightningDataModule, ranks: int = 1, **settings: Any
) -> EnvironmentInference:
    """Environments of a data set, written into a folder."""
    callbacks = [*settings.pop("callbacks", ()), SaveEnvironments(str(folder))]
    chosen = {"settings": QUICK, "folder": str(folder / "features"), **settings}
    module = EnvironmentInference(str(backbone), **chosen)
    trainer = quiet_trainer(folder, ranks, callbacks=callbacks)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return module


def adapter_trainer(
    folder: Path, ranks: int = 1, callbacks: Sequence[Callback] = (), **settings: Any
) -> Trainer:
    """The same, which leaves the trained adapter in ``folder/adapter``."""
    return quiet_trainer(
        folder, ranks, callbacks=[*callbacks, SaveAdapter(str(folder))], **settings
    )


def draw_samples(
    module: ConditionalSampler,
    data: LightningDataModule,
    folder: Path,
    ranks: int = 1,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Draw what a DataModule asks for into a folder."""
    trainer = quiet_trainer(folder, ranks, callbacks=[SaveSamples(str(folder)), *callbacks])
    trainer.predict(module, datamodule=data, return_predictions=False)
