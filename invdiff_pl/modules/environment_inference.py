"""Phase 1: hidden attributes that go along with prompts, from the frozen model's features."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.environments.features import (
    LEVELS,
    BlockFeatures,
    DenoisingLosses,
    require_levels,
)
from invdiff_pl.environments.given_features import read_features
from invdiff_pl.environments.hidden_attribute import (
    HiddenAttribute,
    HiddenAttributeSettings,
    find_hidden_attributes,
)
from invdiff_pl.environments.partition import partition_attribute
from invdiff_pl.environments.table import FeatureTable
from invdiff_pl.modules.common import OnPipeline, hold_frozen
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import remove
from invdiff_pl.utils.names import INFERENCES, require_name

# Names of the features that are computed here; others are read from a file.
_OWN = ("block", "losses")


class EnvironmentInference(OnPipeline):
    """Computes every image's features in one pass, and finds hidden attributes; use ``predict``.

    Any loader will do whose batches hold ``latents`` ``[B, C, h, w]`` (or the VAE posterior's
    ``moments`` ``[B, 2C, h, w]``), ``prompt`` (texts or numbers) and, if images are distributed
    over ranks or come in another order, ``row``, their numbers. Features are written in parts into
    ``folder`` as images pass, so that an interrupted run resumes where it was; what is found is in
    ``found`` on the first rank. :class:`~invdiff_pl.callbacks.SaveEnvironments` writes it.

    Args:
        backbone: a loaded pipeline, or a pipeline folder, hub id or ``asset:NAME``.
        features: ``block``, the output of a block of the denoiser; ``losses``, denoising losses as
            in the InvDiff paper, 32 passes per image; or a file of your own features, see
            :func:`~invdiff_pl.environments.given_features.read_features`.
        block: name of the block, as in ``named_modules()``; the middle one if not given.
        levels: levels of noise at which ``block`` features are taken, as logarithms of the
            signal-to-noise ratio.
        inference: ``mixture``, see :mod:`invdiff_pl.environments.hidden_attribute`; or
            ``partition``, the InvDiff paper's environments, which are never called a bias, see
            :func:`~invdiff_pl.environments.partition.partition_attribute`.
        settings: settings of the mixture, by the names of
            :class:`~invdiff_pl.environments.hidden_attribute.HiddenAttributeSettings`.
        folder: folder of the features; a temporary one if not given.
        resolution: side of the images in pixels; the pipeline's own if not given.
        frozen_weights: how the weights of a backbone that is loaded here are held, see
            :func:`~invdiff_pl.backbones.pipeline.load_pipeline`.
        seed: seed of the noise that all images get, and of the search unless ``settings`` has one.

    Raises:
        InvDiffError: if a setting is wrong, or the backbone cannot be loaded.

    Example:
        >>> import pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> rows = [
        ...     {"latents": torch.randn(4, 16, 16), "prompt": ["a nurse", "a pilot"][n % 2]}
        ...     for n in range(8)
        ... ]
        >>> pipe = tiny_pipeline(["a nurse", "a pilot"])
        >>> module = EnvironmentInference(pipe, settings={"components": 4, "starts": 2})
        >>> trainer = pl.Trainer(
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> _ = trainer.predict(module, DataLoader(rows, batch_size=4))
        >>> module.features.shape, module.found[0].verdict
        (torch.Size([8, 160]), 'untestable')
    """

    stage = "environments"

    def __init__(
        self,
        backbone: str | DiffusionPipeline,
        features: str = "block",
        block: str | None = None,
        levels: Sequence[float] = LEVELS,
        inference: str = "mixture",
        settings: dict[str, Any] | None = None,
        folder: str | None = None,
        resolution: int | None = None,
        frozen_weights: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(backbone, str) else ["backbone"])
        self.require_settings(self.hparams)
        self.settings = HiddenAttributeSettings(**{"seed": seed, **(settings or {})})
        self.kind, self.inference, self.folder = features, inference, folder
        self.block, self.levels, self.seed = block, tuple(levels), seed
        self.attach(backbone, resolution=resolution, frozen_weights=frozen_weights)
        # Registered, so that Lightning moves the weights to the device.
        self.denoiser = self.frozen.network
        self.found: list[HiddenAttribute] = []
        self.features: Tensor = torch.zeros((0, 0))
        self.prompts: Tensor = torch.zeros(0, dtype=torch.int64)

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Check the settings before a network is loaded.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first setting that is wrong.
        """
        require_name("inference", settings["inference"], INFERENCES)
        chosen = settings["settings"] or {}
        known = HiddenAttributeSettings.__dataclass_fields__
        for name in chosen:
            require_name("settings", name, tuple(known))
        try:
            HiddenAttributeSettings(**chosen)
        except InvDiffError as error:
            inside = {name: f"settings.{name}" for name in error.arguments}
            raise InvDiffError(str(error.in_flags(inside)), *inside.values()) from None
        require_levels(settings["levels"])
        if settings["features"] not in _OWN:
            read_features(settings["features"], instead=_OWN)

    def setup(self, stage: str) -> None:
        """Find what an interrupted run left."""
        super().setup(stage)
        if self.owns_backbone:
            hold_frozen(self, *self.frozen.other_networks)
        self._temporary = None
        folder = self.folder
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="invdiff-")
            folder = self.trainer.strategy.broadcast(self._temporary.name)
        self.table = FeatureTable(Path(folder) / "parts")
        self.present = self.table.rows()
        self._passed = 0
        null = self.conditions.null
        self._block = BlockFeatures(self.frozen, null, self.block, self.levels, self.seed)
        self._losses = DenoisingLosses(self.frozen, self.seed)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add the features of a batch to the table."""
        rows = self._rows(batch)
        if torch.isin(rows, self.present).all():
            return
        if self.trainer.world_size > 1 and not isinstance(batch["prompt"], Tensor):
            raise InvDiffError(
                "the loader's batches hold prompts as texts: several ranks need numbers."
            )
        prompts = self.prompt_numbers(batch["prompt"])
        self.table.append(rows, prompts, self.features_of(batch, prompts))

    def _rows(self, batch: Mapping[str, Any]) -> Tensor:
        size = len(batch["prompt"])
        if "row" in batch:
            return batch["row"].cpu()
        if self.trainer.world_size > 1:
            raise InvDiffError(
                "the loader's batches lack 'row', the images' numbers, which several ranks need."
            )
        self._passed += size
        return torch.arange(self._passed - size, self._passed)

    def features_of(self, batch: Mapping[str, Any], prompts: Tensor) -> Tensor:
        """Compute the features of a batch, ``[B, D]``; D is 0 if they are read from a file.

        Args:
            batch: batch that holds ``latents`` or ``moments``.
            prompts: numbers of the prompts, int64 ``[B]``.
        """
        if self.kind not in _OWN:
            return torch.zeros((len(prompts), 0))
        latents = self.latents_of(batch)
        if self.kind == "block":
            return self._block(latents)
        return self._losses(latents, self.conditions[prompts.to(self.device)])

    def on_predict_epoch_end(self) -> None:
        """Search once all ranks have written their features."""
        self.table.flush()
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            self.prompts = self.table.prompts()
            self.features = self._all_features(len(self.prompts))
            if self.inference == "partition":
                self.found = [partition_attribute(self.features, self.prompts)]
            else:
                self.found = find_hidden_attributes(self.features, self.prompts, self.settings)
        self.trainer.strategy.barrier()

    def on_predict_end(self) -> None:
        """Delete the parts: callbacks have saved what was found, and features are in one file."""
        if self.trainer.is_global_zero:
            remove(self.table.folder)

    def _all_features(self, count: int) -> Tensor:
        if self.kind in _OWN:
            return self.table.read(self.table.folder.parent / "features.npy")
        return read_features(self.kind, count, instead=_OWN)
