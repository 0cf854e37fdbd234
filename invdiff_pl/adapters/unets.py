"""Adapters that are a second UNet beside the backbone's: a small one, and the reference's copy."""

import copy
from typing import Any

from diffusers import UNet2DConditionModel

from invdiff_pl.adapters.base import register
from invdiff_pl.adapters.branch import (
    BranchedDenoiser,
    WholeBranchAdapter,
    largest_width,
    multiply,
    zero,
)
from invdiff_pl.utils.errors import InvDiffError

# Numbers of channels are multiples of this, which is also the normalisation's number of groups.
_GROUPS = 4
_HEADS = 2
# Steps between no channels and as many as the backbone has.
_WIDTHS = 64


@register
class SmallUNetAdapter(WholeBranchAdapter):
    """A thin UNet of the backbone's layout, added to its prediction: ``f_theta + s G_psi``.

    Its last layer starts at zero, so the untrained adapter changes nothing.

    Args:
        network: the frozen denoiser, a UNet.
        ratio: maximum size of the adapter, as a share of the backbone's parameters.
        channels: number of channels of each level; chosen by ``ratio`` if not given.

    Raises:
        InvDiffError: if no UNet is small enough.
    """

    kind = "small_unet"

    def __init__(
        self,
        network: UNet2DConditionModel,
        ratio: float = 0.1,
        channels: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(network)
        self.ratio = ratio
        if channels is None:
            width = largest_width(
                lambda width: _thin_unet(network, _channels(network, width)),
                _WIDTHS,
                ratio,
                network,
            )
            channels = _channels(network, width)
        self.channels = tuple(channels)
        branch = _thin_unet(network, self.channels)
        zero(branch.conv_out)
        self._place(branch)
        self._denoiser = BranchedDenoiser(network, branch)

    def rescale(self, factor: float) -> None:
        """Multiply the last layer by the factor."""
        multiply(self.branch.get_submodule("conv_out"), factor)

    def settings(self) -> dict[str, Any]:
        """Return the ratio and the channels."""
        return {"ratio": self.ratio, "channels": list(self.channels)}


def _channels(unet: UNet2DConditionModel, width: int) -> tuple[int, ...]:
    """Return the channels of each level at ``width`` 64ths of the backbone's."""
    return tuple(
        _GROUPS * max(1, round(channels * width / _WIDTHS / _GROUPS))
        for channels in unet.config.block_out_channels
    )


def _thin_unet(unet: UNet2DConditionModel, channels: tuple[int, ...]) -> UNet2DConditionModel:
    config = dict(unet.config) | {
        "block_out_channels": channels,
        "layers_per_block": 1,
        "norm_num_groups": _GROUPS,
        "attention_head_dim": _HEADS,
        "num_attention_heads": None,
    }
    return UNet2DConditionModel.from_config(config)


@register
class UNetCopyAdapter(WholeBranchAdapter):
    """The reference's adapter: a copy of the whole UNet, blended with the frozen one.

    The prediction is ``r G_psi + (1 - r) f_theta`` (at s = 1), and the copy's last layer starts at
    zero. So, unlike all other adapters, it is **not** a no-op at first: training starts from a
    prediction shrunk by ``1 - r``. It has as many parameters as the backbone, and is there for
    comparison.

    Args:
        network: the frozen denoiser, a UNet.
        ratio: r, in (0, 1].
    """

    kind = "unet_copy"
    rescalable = False

    def __init__(self, network: UNet2DConditionModel, ratio: float = 0.5) -> None:
        super().__init__(network)
        if not 0 < ratio <= 1:
            raise InvDiffError(
                f"adapter_settings.ratio={ratio}: expected a share above 0, at most 1.",
                "adapter_settings.ratio",
            )
        self.ratio = ratio
        branch = copy.deepcopy(network)
        zero(branch.conv_out)
        self._place(branch)
        self._denoiser = BranchedDenoiser(network, branch, weight=ratio, shrink=ratio)

    def rescale(self, factor: float) -> None:
        """Refuse: the blend is between the frozen model and the copy, not beyond it.

        Raises:
            InvDiffError: always.
        """
        raise InvDiffError("unet_copy blends two models: its scale has no meaning beyond 1.")

    def settings(self) -> dict[str, Any]:
        """Return the ratio of the blend."""
        return {"ratio": self.ratio}
