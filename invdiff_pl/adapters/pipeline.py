"""The pipeline that users take away: a stock Stable Diffusion pipeline with an invariant scale."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from invdiff_pl.adapters.base import CONFIG_FILE, Adapter, load_adapter
from invdiff_pl.backbones.assets import ASSET_PREFIX, resolve_backbone
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json

# Of an exported folder: the adapter beside the backbone's parts.
ADAPTER_FOLDER = "adapter"


class InvDiffPipeline(StableDiffusionPipeline):
    """``StableDiffusionPipeline`` whose denoiser carries a trained adapter.

    Everything is as in diffusers (schedulers, callbacks, ``to``, offloading); calls take one more
    argument, ``invariant_scale``.

    Example::

        pipe = InvDiffPipeline.from_pretrained("runs/waterbirds/mini")
        pipe("a photo of a mallard", invariant_scale=1.0).images[0]
    """

    adapter: Adapter

    @classmethod
    def from_pretrained(
        cls, source: str | Path, backbone: str | None = None, **kwargs: Any
    ) -> "InvDiffPipeline":
        """Load a run folder, or a folder that ``invdiff export`` or :meth:`save_pretrained` wrote.

        Args:
            source: the folder.
            backbone: pipeline folder, hub id or ``asset:NAME``; that of the folder if not given.
            kwargs: as of ``StableDiffusionPipeline.from_pretrained``.

        Raises:
            InvDiffError: if the folder holds no adapter, or its backbone cannot be loaded.
        """
        found, adapter_folder = locate(Path(source))
        backbone = resolve_backbone(backbone or found)
        try:
            pipeline = super().from_pretrained(backbone, **kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InvDiffError(
                f"cannot load the backbone {backbone!r} of {source} ({reason}): give it with "
                "backbone=, or load from the folder that the run was started in."
            ) from None
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval()
        pipeline.adapter = load_adapter(adapter_folder, pipeline.unet)
        pipeline.unet = pipeline.adapter.denoiser
        return pipeline

    @torch.no_grad()
    def __call__(self, *args: Any, invariant_scale: float = 1.0, **kwargs: Any) -> Any:
        """Draw images.

        Args:
            args: as of ``StableDiffusionPipeline``.
            invariant_scale: s; 0 gives the backbone's images bit for bit, 1 the trained adapter's,
                in between trades bias against fidelity.
            kwargs: as of ``StableDiffusionPipeline``.
        """
        self.adapter.prepare_sampling(self, invariant_scale)
        return super().__call__(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write backbone and adapter, to be loaded with :meth:`from_pretrained`.

        The backbone's parts are as the stock pipeline writes and loads them.
        """
        frozen = self.adapter.frozen_weights()
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.adapter.unet.config)
        unet.load_state_dict(frozen, assign=True)
        parts = {**self.components, "unet": unet}
        stock = StableDiffusionPipeline(
            **parts, requires_safety_checker=self.config.requires_safety_checker
        )
        stock.save_pretrained(save_directory, **kwargs)
        self.adapter.save(Path(save_directory) / ADAPTER_FOLDER)


def locate(folder: Path) -> tuple[str, Path]:
    """Backbone and adapter of a run folder or an exported folder.

    Returns:
        a pipeline folder, hub id or ``asset:NAME``, and the adapter's folder.

    Raises:
        InvDiffError: if the folder is neither, or the run's backbone is no longer there.
    """
    exported = folder / ADAPTER_FOLDER
    if (exported / CONFIG_FILE).is_file() and (folder / "model_index.json").is_file():
        return str(folder), exported
    adapter = folder / "adapter" / "adapter"
    if not (adapter / CONFIG_FILE).is_file():
        raise InvDiffError(
            f"{folder} is neither a run folder with a trained adapter nor an exported one: "
            f"expected {adapter / CONFIG_FILE}, or {exported / CONFIG_FILE} beside "
            "model_index.json."
        )
    record = read_json(folder / "adapter" / "stage.json")
    return str(record["config"]["model"]["init_args"]["backbone"]), adapter


def is_local(backbone: str) -> bool:
    """Whether a backbone is a folder on this machine, rather than a hub id."""
    return backbone.startswith(ASSET_PREFIX) or Path(backbone).is_dir()
