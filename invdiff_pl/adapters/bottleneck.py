"""An adapter in h-space: it changes the UNet's bottleneck, given the prompt and the timestep."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from invdiff_pl.adapters.base import register
from invdiff_pl.adapters.branch import BranchAdapter, largest_width, multiply, zero
from invdiff_pl.utils.errors import InvDiffError

# The branch is a submodule of the UNet under this name, so it moves between devices with it.
NAME = "invariant_bottleneck"
_STEP = 8
_WIDEST = 256


class PromptEncoder(nn.Module):
    """Phi: what matters to the adapter in a prompt, pooled over its tokens by learned attention.

    Args:
        text_width: D, the width of the text embeddings.
        width: width of the output.
    """

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.attend = nn.Linear(text_width, 1, bias=False)
        self.project = nn.Linear(text_width, width)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map text embeddings ``[B, L, D]`` to ``[B, width]``."""
        tokens = self.norm(embeddings)
        shares = self.attend(tokens).softmax(1)
        encoded: Tensor = nn.functional.silu(self.project((shares * tokens).sum(1)))
        return encoded


class BottleneckBranch(nn.Module):
    """The change added to the bottleneck ``h``: a narrow network steered by timestep and prompt.

    Args:
        channels: C, the number of channels of the bottleneck.
        time_width: E, the width of the timestep embedding.
        text_width: D, the width of the text embeddings.
        groups: number of groups of the normalisation.
        width: width of the network and of Phi.
    """

    def __init__(
        self, channels: int, time_width: int, text_width: int, groups: int, width: int
    ) -> None:
        super().__init__()
        self.prompt_encoder = PromptEncoder(text_width, width)
        self.norm = nn.GroupNorm(groups, channels)
        self.reduce = nn.Conv2d(channels, width, 1)
        self.steer = nn.Linear(time_width + width, 2 * width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.expand = nn.Conv2d(width, channels, 1)
        zero(self.expand)

    def forward(self, hidden: Tensor, time: Tensor, embeddings: Tensor) -> Tensor:
        """Map h ``[B, C, H, W]``, time ``[B, E]`` and text ``[B, L, D]`` to a change of h."""
        condition = torch.cat([nn.functional.silu(time), self.prompt_encoder(embeddings)], dim=1)
        gain, shift = self.steer(condition)[..., None, None].chunk(2, dim=1)
        inner = self.reduce(self.norm(hidden)) * (1 + gain) + shift
        change: Tensor = self.expand(nn.functional.silu(self.mix(nn.functional.silu(inner))))
        return change


@register
class BottleneckAdapter(BranchAdapter):
    """Adds ``s G_psi(h, t, Phi(c))`` to the output of the UNet's middle block, its h-space.

    h-space holds what a picture is about (Kwon et al., arXiv 2210.10960); details bypass it. The
    last layer starts at zero, so the untrained adapter changes nothing. Gradients run through the
    frozen decoder.

    Args:
        network: the frozen denoiser, a UNet.
        ratio: maximum size of the adapter, as a share of the backbone's parameters.
        width: width of the adapter's network; chosen by ``ratio`` if not given.

    Raises:
        InvDiffError: if no such network is small enough, or the UNet's middle block sees no text.
    """

    kind = "bottleneck"

    def __init__(
        self, network: UNet2DConditionModel, ratio: float = 0.03, width: int | None = None
    ) -> None:
        super().__init__(network)
        if not getattr(network.mid_block, "has_cross_attention", False):
            raise InvDiffError(
                "adapter=bottleneck needs a UNet whose middle block attends to the prompt "
                "(UNetMidBlock2DCrossAttn): choose another adapter.",
                "adapter",
            )
        self.ratio = ratio
        if width is None:
            found = largest_width(lambda n: _branch(network, n * _STEP), _WIDEST, ratio, network)
            width = found * _STEP
        self.width = width
        self.scale = 1.0
        self._place(_branch(network, width))
        network.add_module(NAME, self.branch)
        network.mid_block.register_forward_hook(self._change, with_kwargs=True)

    def _change(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
    ) -> Tensor:
        if self.scale == 0:
            return hidden
        change: Tensor = self.branch(hidden, args[1], kwargs["encoder_hidden_states"])
        return hidden + self.scale * change

    @property
    def denoiser(self) -> nn.Module:
        """The UNet itself, which calls the branch."""
        return self.network

    def settings(self) -> dict[str, Any]:
        """Return the ratio and the width."""
        return {"ratio": self.ratio, "width": self.width}

    def set_scale(self, scale: float) -> None:
        """Scale the change; at 0 it is not computed."""
        self.scale = scale

    def rescale(self, factor: float) -> None:
        """Multiply the last layer by the factor."""
        multiply(self.branch.get_submodule("expand"), factor)

    def enable_gradient_checkpointing(self) -> None:
        """Checkpoint the whole UNet, since the gradients run through its decoder."""
        self.network.enable_gradient_checkpointing()

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the UNet's weights, without the branch attached to it."""
        state = self.network.state_dict()
        return {n: value for n, value in state.items() if not n.startswith(f"{NAME}.")}

    def prepare_sampling(self, pipeline: StableDiffusionPipeline, scale: float) -> None:
        """Set the scale; the pipeline's UNet carries the branch."""
        self.set_scale(scale)
        pipeline.unet = self.network


def _branch(unet: UNet2DConditionModel, width: int) -> BottleneckBranch:
    return BottleneckBranch(
        channels=unet.config.block_out_channels[-1],
        time_width=unet.time_embedding.linear_2.out_features,
        text_width=unet.config.cross_attention_dim,
        groups=unet.config.norm_num_groups,
        width=width,
    )
