"""The interface of all adapters, and the registry that finds one by name."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from invdiff_pl.backbones.quantized import weight_count
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_object, write_json

CONFIG_FILE = "adapter.json"


class Adapter(ABC):
    """Base class of adapters: ``G_psi`` beside a frozen denoiser.

    An adapter is attached to a denoiser, which it may wrap or inject layers into. Until it has been
    trained it changes nothing: the adapted denoiser predicts what the frozen one does (except with
    ``unet_copy``, which follows the reference).

    Args:
        network: the frozen denoiser.
    """

    kind: ClassVar[str]
    # Whether scales beyond 1 mean more of the same.
    rescalable: ClassVar[bool] = True

    def __init__(self, network: Any) -> None:
        self.network = network
        # Parameters of the frozen denoiser, counted before anything is injected into it.
        self.backbone_size = sum(
            weight_count(value)
            for name, value in network.named_parameters()
            if ".lora_" not in name
        )

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The adapted denoiser, called in the same way as the frozen one."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments with which saved weights are loaded, JSON-ready."""

    @abstractmethod
    def set_scale(self, scale: float) -> None:
        """Set the invariant scale s; 0 gives the frozen denoiser's prediction bit for bit."""

    @abstractmethod
    def rescale(self, factor: float) -> None:
        """Change the weights so that scale 1 does what scale ``factor`` did, if that is linear."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, more time."""

    @abstractmethod
    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the backbone's own weights under their own names, without the adapter."""

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write the weights into an existing folder as safetensors."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Read what :meth:`save_weights` wrote."""

    @abstractmethod
    def prepare_sampling(self, pipeline: Any, scale: float) -> None:
        """Put the adapter into a pipeline at a scale, in its fastest form."""

    def prepare_training(self) -> None:  # noqa: B027 - most are held as they are trained
        """Prepare the adapter for training."""

    def detach(self) -> None:  # noqa: B027 - a network of its own leaves no trace
        """Restore the denoiser to what it was; the adapter cannot be used afterwards."""

    @contextmanager
    def at_scale(self, scale: float) -> Iterator[None]:
        """Use the adapter at a scale, beside other LoRAs of the denoiser, then reset it to 1."""
        self.set_scale(scale)
        try:
            yield
        finally:
            self.set_scale(1.0)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Hold the adapter in its fastest form at scale 1, the scale of training, for inference.

        Predictions are the same up to rounding, and the weights are restored afterwards.
        """
        yield

    def size(self) -> int:
        """Return the number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters().values())

    def save(self, folder: Path, **facts: Any) -> None:
        """Write weights and configuration.

        Args:
            folder: folder to write to, created if missing.
            facts: further entries of the configuration, JSON-ready.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        config = {
            "kind": self.kind,
            "settings": self.settings(),
            "parameters": self.size(),
            "share": self.size() / self.backbone_size,
            **facts,
        }
        write_json(folder / CONFIG_FILE, config)


_REGISTRY: dict[str, type[Adapter]] = {}


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Register an adapter class under its ``kind``."""
    _REGISTRY[adapter.kind] = adapter
    return adapter


def adapter_class(kind: str) -> type[Adapter]:
    """Return the class of a kind of adapter.

    Raises:
        InvDiffError: if there is no such kind.
    """
    if kind not in _REGISTRY:
        raise InvDiffError(
            f"adapter={kind}: there is no such adapter; expected one of "
            f"{', '.join(sorted(_REGISTRY))}.",
            "adapter",
        )
    return _REGISTRY[kind]


def build_adapter(kind: str, network: Any, **settings: Any) -> Adapter:
    """Attach a new adapter of a kind to a denoiser.

    Args:
        kind: ``lora``, ``small_unet``, ``bottleneck`` or ``unet_copy``.
        network: the frozen denoiser.
        settings: settings of that kind.

    Raises:
        InvDiffError: if there is no such kind, or it has no such setting.
    """
    require_adapter(kind, settings)
    try:
        return adapter_class(kind)(network, **settings)
    except InvDiffError:
        raise
    except (TypeError, ValueError) as error:
        raise InvDiffError(
            f"`adapter_settings`: {error} (adapter {kind!r}).", "adapter_settings"
        ) from None


def require_adapter(kind: str, settings: Mapping[str, Any]) -> None:
    """Check a kind of adapter and the names of its settings before a network is loaded.

    Raises:
        InvDiffError: if there is no such kind, or it has no such setting.
    """
    adapter = adapter_class(kind)
    known = [name for name in inspect.signature(adapter).parameters if name != "network"]
    if unknown := sorted(set(settings) - set(known)):
        raise InvDiffError(
            f"`adapter_settings`: adapter {kind!r} has no setting {unknown[0]!r}; expected "
            f"some of {', '.join(known)}.",
            "adapter_settings",
        )


def load_adapter(folder: Path, network: Any) -> Adapter:
    """Attach a saved adapter to a denoiser.

    Args:
        folder: folder that :meth:`Adapter.save` wrote.
        network: the frozen denoiser that the adapter was trained beside.

    Raises:
        InvDiffError: if the folder holds no adapter, or a damaged one.
    """
    config = read_object(folder / CONFIG_FILE, kind=str, settings=dict)
    adapter = build_adapter(config["kind"], network, **config["settings"])
    adapter.load_weights(folder)
    return adapter
