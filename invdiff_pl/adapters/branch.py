"""Adapters that are a network of their own beside the frozen denoiser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import save_file
from torch import Tensor, nn

from invdiff_pl.adapters.base import Adapter
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import sort_safetensors_header
from invdiff_pl.utils.tensors import read_tensors

WEIGHTS_FILE = "adapter.safetensors"


class BranchedDenoiser(ModelMixin):
    """Frozen denoiser and branch as one network, which takes the UNet's place in pipelines.

    The prediction is ``(1 - s shrink) f_theta + s weight G_psi``: with ``shrink`` 0 and ``weight``
    1 it is additive, with both equal to ``r`` it is the reference's blending. At s = 0 the branch
    is not computed, and the prediction is the frozen one, bit for bit. All other attributes (the
    configuration, attention processors, LoRAs) are those of the frozen UNet.

    Args:
        unet: the frozen denoiser.
        branch: a network called in the same way.
        weight: weight of the branch's output.
        shrink: share by which the frozen prediction is shrunk.
    """

    unet: UNet2DConditionModel

    def __init__(
        self,
        unet: UNet2DConditionModel,
        branch: UNet2DConditionModel,
        weight: float = 1.0,
        shrink: float = 0.0,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.branch = branch
        self.weight = weight
        self.shrink = shrink
        self.scale = 1.0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict ``[B, C, H, W]``; the arguments are those of ``UNet2DConditionModel``."""
        given = (sample, timestep, encoder_hidden_states)
        frozen: Tensor = self.unet(*given, return_dict=False, **kwargs)[0]
        prediction = frozen
        if self.scale != 0:
            delta: Tensor = self.branch(*given, return_dict=False)[0]
            prediction = (1 - self.scale * self.shrink) * frozen + self.scale * self.weight * delta
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


class BranchAdapter(Adapter):
    """Base class of adapters with a network of their own, which they set as ``branch``."""

    branch: nn.Module

    def _place(self, branch: nn.Module) -> None:
        """Set the branch, on the UNet's device and in its dtype."""
        branch = branch.to(self.network.device)
        if self.network.dtype != torch.float32:  # diffusers warns about every cast
            branch = branch.to(self.network.dtype)
        self.branch = branch.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the branch's parameters."""
        return dict(self.branch.named_parameters())

    def save_weights(self, folder: Path) -> None:
        """Write the branch's weights, float32."""
        state = {
            name: value.detach().float().cpu().contiguous()
            for name, value in self.branch.state_dict().items()
        }
        save_file(state, folder / WEIGHTS_FILE)
        sort_safetensors_header(folder / WEIGHTS_FILE)

    def load_weights(self, folder: Path) -> None:
        """Read the branch's weights; none may be missing."""
        file = folder / WEIGHTS_FILE
        state = read_tensors(file, "rerun the adapter stage")
        expected = self.branch.state_dict()
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in expected.items()}:
            raise InvDiffError(f"{file} was made for another backbone: its layers do not match.")
        self.branch.load_state_dict(state)


class WholeBranchAdapter(BranchAdapter):
    """A branch that is a whole UNet; the two are called as one :class:`BranchedDenoiser`."""

    _denoiser: BranchedDenoiser

    @property
    def denoiser(self) -> BranchedDenoiser:
        """The frozen denoiser and the branch as one network."""
        return self._denoiser

    def set_scale(self, scale: float) -> None:
        """Scale the branch's part; at 0 it is not computed."""
        self._denoiser.scale = scale

    def enable_gradient_checkpointing(self) -> None:
        """Checkpoint the branch; the frozen denoiser keeps no activations."""
        self._denoiser.branch.enable_gradient_checkpointing()

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the weights of the UNet, which is unchanged."""
        return dict(self.network.state_dict())

    def prepare_sampling(self, pipeline: StableDiffusionPipeline, scale: float) -> None:
        """Put both networks in the place of the UNet."""
        self.set_scale(scale)
        pipeline.unet = self._denoiser


@torch.no_grad()
def multiply(layer: nn.Module, factor: float) -> None:
    """Make a layer's output ``factor`` times as large."""
    for parameter in layer.parameters():
        parameter.mul_(factor)


def zero(layer: nn.Module) -> None:
    """Make a layer's output zero for any input."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def largest_width(
    build: Callable[[int], nn.Module], most: int, ratio: float, unet: UNet2DConditionModel
) -> int:
    """Find the largest width whose network has at most ``ratio`` times the UNet's parameters.

    Args:
        build: builds the network of a width; its size grows with the width.
        most: the largest width that is tried.
        ratio: share of the UNet's parameters, above 0.
        unet: the frozen denoiser.

    Raises:
        InvDiffError: if even width 1 is too large.
    """
    size = sum(parameter.numel() for parameter in unet.parameters())

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build(width).parameters())

    smallest = count(1)
    if smallest > ratio * size:
        raise InvDiffError(
            f"adapter_settings.ratio={ratio}: the smallest such adapter has {smallest} "
            f"parameters, {smallest / size:.3f} of the backbone's; expected at least that.",
            "adapter_settings.ratio",
        )
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) <= ratio * size else (low, middle - 1)
    return low
