"""The pipeline that users take away: a stock one with an invariant scale."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from invdiff_pl.adapters.base import CONFIG_FILE, Adapter, load_adapter
from invdiff_pl.adapters.lora import NAME, LoraAdapter, active_adapters
from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.backbones.assets import ASSET_PREFIX, resolve_backbone
from invdiff_pl.backbones.check import absent_parts, check_backbone
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.folders import load_in_one_dtype, pipeline_variant
from invdiff_pl.backbones.pipeline import frozen, limit_tokens
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file, is_folder, read_object

# Name of the adapter's folder, beside the backbone's parts, in an exported folder.
ADAPTER_FOLDER = "adapter"


class CarriesAdapter:
    """Mixin that gives a stock pipeline a trained adapter and a scale for it."""

    adapter: Adapter | None = None
    components: dict[str, Any]
    config: Any

    @classmethod
    def from_pretrained(cls, source: str | Path, backbone: str | None = None, **kwargs: Any) -> Any:
        """Load a run folder, or a folder that ``invdiff export`` or :meth:`save_pretrained` wrote.

        Args:
            source: the folder.
            backbone: pipeline folder, hub id or ``asset:NAME``; that of the folder if not given.
            kwargs: as for ``DiffusionPipeline.from_pretrained``; all parts are loaded in ``dtype``,
                float32 if not given, and a folder without plain weights is loaded from a variant.

        Raises:
            InvDiffError: if the folder holds no adapter, or its backbone cannot be loaded.
        """
        found, adapter_folder = locate(Path(source))
        backbone = backbone or found
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            kwargs["dtype"] = torch.float32
        try:
            name = check_backbone(backbone).replace("Img2Img", "")
            resolved = resolve_backbone(backbone)
            kwargs.setdefault("variant", pipeline_variant(Path(resolved)))
            made = cls._of(getattr(diffusers, name))
            taken = inspect.signature(made).parameters
            kwargs |= {part: None for part in absent_parts(backbone) if part in taken}
            pipeline = super(CarriesAdapter, made).from_pretrained(resolved, **kwargs)  # type: ignore[misc]
        except (InvDiffError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InvDiffError(
                f"cannot load the backbone {backbone!r} of {source} ({reason}): give it with "
                "backbone=, or load from the folder that the run was started in."
            ) from None
        frozen(pipeline)._carry(adapter_folder)
        return pipeline

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        lora: TrainedAdapter | str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build one from a loaded pipeline, sharing all of its parts.

        Args:
            pipeline: your own pipeline. Its denoiser is changed in place: with a LoRA adapter the
                given pipeline draws with it, too (see ``disable_lora`` and ``set_adapters``).
            lora: a trained adapter, or the folder of an adapter, a run or an export. If not given,
                the adapter that the given pipeline carries is used.
            kwargs: as for ``DiffusionPipeline.from_pipe``; the dtype is the denoiser's if not
                given.

        Raises:
            InvDiffError: if the folder holds no adapter, or one for another backbone, or the given
                pipeline has an adapter already.

        Example::

            own = StableDiffusionPipeline.from_pretrained("my-model")
            pipe = InvDiffPipeline.from_pipe(own, lora="runs/waterbirds/mini")
        """
        denoiser = frozen_denoiser(pipeline)
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            kwargs["dtype"] = denoiser.network.dtype
        # Named, for it may be a denoiser with a branch, of a class that diffusers does not expect.
        kwargs = {denoiser.part: denoiser.network, **kwargs}
        kind = cls._of(denoiser.stock)
        made = super(CarriesAdapter, kind).from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        made.adapter = getattr(pipeline, "adapter", None)
        limit_tokens(made)
        if lora is not None:
            if made.adapter is not None or NAME in getattr(denoiser.network, "peft_config", {}):
                raise InvDiffError("lora=: the pipeline carries an invariant adapter already.")
            folder = lora.folder if isinstance(lora, TrainedAdapter) else Path(lora)
            made._carry(folder if is_file(folder / CONFIG_FILE) else locate(folder)[1])
        return made

    def _carry(self, folder: Path) -> None:
        """Attach a saved adapter."""
        limit_tokens(self)
        denoiser = frozen_denoiser(self)
        self.adapter = load_adapter(folder, denoiser.network)
        for parameter in self.adapter.parameters().values():
            parameter.requires_grad_(False)
        denoiser.network = self.adapter.denoiser

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Load a further LoRA, as stock pipelines do; the invariant adapter stays active beside it.

        Args:
            args: as for the stock pipeline.
            kwargs: as for the stock pipeline.
        """
        joined = NAME in active_adapters(frozen_denoiser(self).network)
        super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]
        if joined and isinstance(self.adapter, LoraAdapter):
            self.adapter.join()

    @torch.no_grad()
    def __call__(self, *args: Any, invariant_scale: float = 1.0, **kwargs: Any) -> Any:
        """Draw images.

        Args:
            args: as for the stock pipeline.
            invariant_scale: s; 0 gives the backbone's images bit for bit, 1 the trained adapter's;
                values in between trade bias against fidelity. It multiplies the weight that
                ``set_adapters`` gave the adapter, for this call only; other LoRAs keep their
                weights.
            kwargs: as for the stock pipeline.

        Raises:
            InvDiffError: if a scale is given and there is no adapter, or the adapter is fused.
        """
        if self.adapter is None:
            if invariant_scale != 1.0:
                raise InvDiffError(
                    f"invariant_scale={invariant_scale}: the pipeline carries no adapter; give one "
                    "by InvDiffPipeline.from_pipe(pipeline, lora=FOLDER)."
                )
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with self.adapter.at_scale(invariant_scale):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the backbone and the adapter, to be loaded with :meth:`from_pretrained`.

        The backbone's parts are written as the stock pipeline writes and loads them. LoRAs that
        were loaded beside the adapter are not written.

        Raises:
            InvDiffError: if there is no adapter.
        """
        if self.adapter is None:
            raise InvDiffError("the pipeline carries no adapter to save.")
        denoiser, own = frozen_denoiser(self), self.adapter.network
        kind = next(each for each in type(own).__mro__ if each.__module__.startswith("diffusers."))
        with torch.device("meta"):
            plain = kind.from_config(own.config)  # type: ignore[attr-defined]
        plain.load_state_dict(self.adapter.frozen_weights(), assign=True)
        parts = {**self.components, denoiser.part: plain}
        told = inspect.signature(denoiser.stock).parameters.keys() - parts.keys()
        options = {name: self.config[name] for name in told if name in self.config}
        denoiser.stock(**parts, **options).save_pretrained(save_directory, **kwargs)
        load_in_one_dtype(Path(save_directory))
        self.adapter.save(Path(save_directory) / ADAPTER_FOLDER)

    @classmethod
    def _of(cls, stock: Any) -> Any:
        """Return this class if it derives from the stock one; else the class that does."""
        return cls if issubclass(cls, stock) else _carrying(stock)


@cache
def _carrying(stock: Any) -> Any:
    """Return the class of a stock pipeline whose denoiser carries an adapter."""
    about = {"__doc__": f"``{stock.__name__}`` whose denoiser carries a trained adapter."}
    return type(f"InvDiff{stock.__name__}", (CarriesAdapter, stock), about)


class InvDiffPipeline(CarriesAdapter, StableDiffusionPipeline):
    """``StableDiffusionPipeline`` whose denoiser carries a trained adapter.

    Everything works as in diffusers (schedulers, callbacks, ``to``, offloading, further LoRAs);
    calls take one more argument, ``invariant_scale``. Among the pipeline's LoRAs, the adapter is
    named ``invdiff``. For a pipeline of another family, :meth:`from_pipe` and
    :meth:`from_pretrained` return that family's counterpart, such as ``InvDiffFluxPipeline``.

    Example:
        >>> import tempfile
        >>> from invdiff_pl.adapters import build_adapter
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> trained = build_adapter("lora", tiny_pipeline(["a photo of a mallard"]).unet)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained.save(Path(folder) / "even-birds")
        ...     own = tiny_pipeline(["a photo of a mallard"])
        ...     pipe = InvDiffPipeline.from_pipe(own, Path(folder) / "even-birds")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> settings = {"num_inference_steps": 1, "invariant_scale": 0.8}
        >>> pipe("a photo of a mallard", **settings).images[0].size
        (32, 32)

    A run's adapter combined with a style LoRA of your own::

        pipe = InvDiffPipeline.from_pretrained("runs/waterbirds/mini")
        pipe.load_lora_weights("style.safetensors", adapter_name="style")
        pipe.set_adapters(["invdiff", "style"], [1.0, 0.7])
    """


def locate(folder: Path) -> tuple[str, Path]:
    """Find the backbone and the adapter of a run folder or an exported folder.

    Returns:
        the backbone (a pipeline folder, hub id or ``asset:NAME``) and the adapter's folder.

    Raises:
        InvDiffError: if the folder is neither, or the run's record cannot be read.
    """
    exported = folder / ADAPTER_FOLDER
    if is_file(exported / CONFIG_FILE) and is_file(folder / "model_index.json"):
        return str(folder), exported
    adapter = folder / "adapter" / "adapter"
    if not is_file(adapter / CONFIG_FILE):
        raise InvDiffError(
            f"{folder} is neither a run folder with a trained adapter nor an exported one: "
            f"expected {adapter / CONFIG_FILE}, or {exported / CONFIG_FILE} beside "
            "model_index.json."
        )
    record = folder / "adapter" / "stage.json"
    try:
        backbone = read_object(record, config=dict)["config"]["model"]["init_args"]["backbone"]
    except (KeyError, TypeError):
        raise InvDiffError(f"{record} does not name the backbone: run the stage again.") from None
    return str(backbone), adapter


def is_local(backbone: str) -> bool:
    """Whether a backbone is a folder on this machine, rather than a hub id."""
    return backbone.startswith(ASSET_PREFIX) or is_folder(Path(backbone))
