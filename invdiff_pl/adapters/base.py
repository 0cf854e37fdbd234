"""What every adapter offers, and the registry that finds one by name."""

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
    """``G_psi`` beside a frozen denoiser.

    An adapter is attached to a denoiser, which it may wrap or inject layers into. Until it has been
    trained it changes nothing: the prediction of the adapted denoiser is that of the frozen one
    (but for ``unet_copy``, which is the reference's).

    Args:
        network: the frozen denoiser.
    """

    kind: ClassVar[str]
    # Whether scales beyond 1 mean more of the same.
    rescalable: ClassVar[bool] = True

    def __init__(self, network: Any) -> None:
        self.network = network
        # Of the frozen denoiser, before anything is injected into it.
        self.backbone_size = sum(
            weight_count(value)
            for name, value in network.named_parameters()
            if ".lora_" not in name
        )

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The adapted denoiser, which is called as the frozen one is."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments with which saved weights are loaded, JSON-ready."""

    @abstractmethod
    def set_scale(self, scale: float) -> None:
        """Set the invariant scale s; 0 gives the frozen denoiser's prediction bit for bit."""

    @abstractmethod
    def rescale(self, factor: float) -> None:
        """Change the weights so that scale 1 is what scale ``factor`` was, where that is linear."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, more time."""

    @abstractmethod
    def frozen_weights(self) -> dict[str, Tensor]:
        """The backbone's own weights under their own names, without the adapter."""

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write the weights into an existing folder as safetensors."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Read what :meth:`save_weights` wrote."""

    @abstractmethod
    def prepare_sampling(self, pipeline: Any, scale: float) -> None:
        """Put the adapter at a scale into a pipeline, in its fastest form."""

    def prepare_training(self) -> None:  # noqa: B027 - most are held as they are trained
        """Make ready to be trained."""

    def detach(self) -> None:  # noqa: B027 - a network of its own leaves no trace
        """Leave the denoiser as it was found; the adapter is of no use afterwards."""

    @contextmanager
    def at_scale(self, scale: float) -> Iterator[None]:
        """At a scale, beside whatever else a pipeline's denoiser carries, and back at 1."""
        self.set_scale(scale)
        try:
            yield
        finally:
            self.set_scale(1.0)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """In its fastest form at scale 1, as in training, while nothing is trained.

        Predictions are the same up to rounding, and the weights afterwards what they were.
        """
        yield

    def size(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters().values())

    def save(self, folder: Path, **facts: Any) -> None:
        """Write weights and configuration.

        Args:
            folder: to write to, created where it is missing.
            facts: further things to tell in the configuration, JSON-ready.
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
    """Make an adapter class known by its ``kind``."""
    _REGISTRY[adapter.kind] = adapter
    return adapter


def adapter_class(kind: str) -> type[Adapter]:
    """The class of a kind of adapter.

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
        settings: of that kind.

    Raises:
        InvDiffError: if there is no such kind, or a setting is not of this kind.
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
    """Refuse a kind of adapter or a setting's name before a network is there to attach it to.

    Raises:
        InvDiffError: if there is no such kind, or a setting is not of this kind.
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
        folder: that :meth:`Adapter.save` wrote.
        network: the frozen denoiser that it was trained beside.

    Raises:
        InvDiffError: if the folder holds no adapter, or a damaged one.
    """
    config = read_object(folder / CONFIG_FILE, kind=str, settings=dict)
    adapter = build_adapter(config["kind"], network, **config["settings"])
    adapter.load_weights(folder)
    return adapter
