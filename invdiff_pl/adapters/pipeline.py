"""The pipeline that users take away: a stock Stable Diffusion pipeline with an invariant scale."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from invdiff_pl.adapters.base import CONFIG_FILE, Adapter, load_adapter
from invdiff_pl.adapters.lora import NAME, LoraAdapter, active_adapters
from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.backbones.assets import ASSET_PREFIX, resolve_backbone
from invdiff_pl.backbones.check import check_backbone
from invdiff_pl.backbones.folders import load_in_one_dtype, pipeline_variant
from invdiff_pl.backbones.pipeline import limit_tokens
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json

# Of an exported folder: the adapter beside the backbone's parts.
ADAPTER_FOLDER = "adapter"


class InvDiffPipeline(StableDiffusionPipeline):
    """``StableDiffusionPipeline`` whose denoiser carries a trained adapter.

    Everything is as in diffusers (schedulers, callbacks, ``to``, offloading, further LoRAs); calls
    take one more argument, ``invariant_scale``. Among the pipeline's LoRAs the adapter has the name
    ``invdiff``.

    Example:
        >>> import tempfile
        >>> from invdiff_pl.adapters import build_adapter
        >>> from invdiff_pl.backbones.architecture import tiny_pipeline
        >>> trained = build_adapter("lora", tiny_pipeline(["a photo of a mallard"]).unet)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained.save(Path(folder) / "even-birds")
        ...     own = tiny_pipeline(["a photo of a mallard"])
        ...     pipe = InvDiffPipeline.from_pipe(own, Path(folder) / "even-birds")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> settings = {"num_inference_steps": 1, "invariant_scale": 0.8}
        >>> pipe("a photo of a mallard", **settings).images[0].size
        (32, 32)

    A run's adapter beside a style of one's own::

        pipe = InvDiffPipeline.from_pretrained("runs/waterbirds/mini")
        pipe.load_lora_weights("style.safetensors", adapter_name="style")
        pipe.set_adapters(["invdiff", "style"], [1.0, 0.7])
    """

    adapter: Adapter | None = None
    unet: Any

    @classmethod
    def from_pretrained(
        cls, source: str | Path, backbone: str | None = None, **kwargs: Any
    ) -> "InvDiffPipeline":
        """Load a run folder, or a folder that ``invdiff export`` or :meth:`save_pretrained` wrote.

        Args:
            source: the folder.
            backbone: pipeline folder, hub id or ``asset:NAME``; that of the folder if not given.
            kwargs: as of ``StableDiffusionPipeline.from_pretrained``; all parts are loaded in
                ``dtype``, float32 if not given, and of a folder without plain weights a variant's
                are taken.

        Raises:
            InvDiffError: if the folder holds no adapter, or its backbone cannot be loaded.
        """
        found, adapter_folder = locate(Path(source))
        backbone = backbone or found
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            kwargs["dtype"] = torch.float32
        try:
            check_backbone(backbone)
            resolved = resolve_backbone(backbone)
            kwargs.setdefault("variant", pipeline_variant(Path(resolved)))
            pipeline = super().from_pretrained(resolved, **kwargs)
        except (InvDiffError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InvDiffError(
                f"cannot load the backbone {backbone!r} of {source} ({reason}): give it with "
                "backbone=, or load from the folder that the run was started in."
            ) from None
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval()
        pipeline._carry(adapter_folder)
        return pipeline

    @classmethod
    def from_pipe(
        cls,
        pipeline: StableDiffusionPipeline,
        lora: TrainedAdapter | str | Path | None = None,
        **kwargs: Any,
    ) -> "InvDiffPipeline":
        """Make one of a loaded pipeline, with which it shares all parts.

        Args:
            pipeline: one's own. Its denoiser is changed in place: with a LoRA adapter the given
                pipeline draws with it, too (see ``disable_lora`` and ``set_adapters``).
            lora: a trained adapter, or the folder of one, of a run or of an export. Without it the
                adapter is the one that the given pipeline carries.
            kwargs: as of ``DiffusionPipeline.from_pipe``; the dtype is the denoiser's if not given.

        Raises:
            InvDiffError: if the folder holds no adapter, or one of another backbone, or the given
                pipeline has an adapter already.

        Example::

            own = StableDiffusionPipeline.from_pretrained("my-model")
            pipe = InvDiffPipeline.from_pipe(own, lora="runs/waterbirds/mini")
        """
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            kwargs["dtype"] = pipeline.unet.dtype
        # Named, for it may be a denoiser with a branch, of a class that diffusers does not expect.
        made = super().from_pipe(pipeline, **{"unet": pipeline.unet, **kwargs})
        made.adapter = getattr(pipeline, "adapter", None)
        limit_tokens(made)
        if lora is not None:
            if made.adapter is not None or NAME in getattr(made.unet, "peft_config", {}):
                raise InvDiffError("lora=: the pipeline carries an invariant adapter already.")
            folder = lora.folder if isinstance(lora, TrainedAdapter) else Path(lora)
            made._carry(folder if (folder / CONFIG_FILE).is_file() else locate(folder)[1])
        return made

    def _carry(self, folder: Path) -> None:
        """Attach a saved adapter."""
        limit_tokens(self)
        self.adapter = load_adapter(folder, self.unet)
        for parameter in self.adapter.parameters().values():
            parameter.requires_grad_(False)
        self.unet = self.adapter.denoiser

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Load a further LoRA, as stock pipelines do; the invariant adapter stays active beside it.

        Args:
            args: as of ``StableDiffusionPipeline``.
            kwargs: as of ``StableDiffusionPipeline``.
        """
        joined = NAME in active_adapters(self.unet)
        super().load_lora_weights(*args, **kwargs)
        if joined and isinstance(self.adapter, LoraAdapter):
            self.adapter.join()

    @torch.no_grad()
    def __call__(self, *args: Any, invariant_scale: float = 1.0, **kwargs: Any) -> Any:
        """Draw images.

        Args:
            args: as of ``StableDiffusionPipeline``.
            invariant_scale: s; 0 gives the backbone's images bit for bit, 1 the trained adapter's,
                in between trades bias against fidelity. It multiplies the weight that
                ``set_adapters`` gave the adapter, for this call only; other LoRAs are combined with
                it as they are.
            kwargs: as of ``StableDiffusionPipeline``.

        Raises:
            InvDiffError: if a scale is given and there is no adapter, or it is fused.
        """
        if self.adapter is None:
            if invariant_scale != 1.0:
                raise InvDiffError(
                    f"invariant_scale={invariant_scale}: the pipeline carries no adapter; give one "
                    "by InvDiffPipeline.from_pipe(pipeline, lora=FOLDER)."
                )
            return super().__call__(*args, **kwargs)
        with self.adapter.at_scale(invariant_scale):
            return super().__call__(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write backbone and adapter, to be loaded with :meth:`from_pretrained`.

        The backbone's parts are as the stock pipeline writes and loads them. LoRAs that were
        loaded beside the adapter are not written.

        Raises:
            InvDiffError: if there is no adapter.
        """
        if self.adapter is None:
            raise InvDiffError("the pipeline carries no adapter to save.")
        frozen = self.adapter.frozen_weights()
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.adapter.network.config)
        unet.load_state_dict(frozen, assign=True)
        parts = {**self.components, "unet": unet}
        stock = StableDiffusionPipeline(
            **parts, requires_safety_checker=self.config.requires_safety_checker
        )
        stock.save_pretrained(save_directory, **kwargs)
        load_in_one_dtype(Path(save_directory))
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
