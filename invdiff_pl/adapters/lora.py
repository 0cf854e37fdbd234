"""Low-rank adapters through peft, in the file form that stock diffusers loads."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from invdiff_pl.adapters.base import Adapter, register
from invdiff_pl.adapters.lora_files import plain_config, scaled, stored_alpha
from invdiff_pl.adapters.low_rank import train_folded
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.quantized import is_quantized
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import sort_safetensors_header
from invdiff_pl.utils.tensors import read_tensors

NAME = "invdiff"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"

# Which layers each name stands for.
_SPATIAL = r"conv1|conv2|downsamplers\.0\.conv|upsamplers\.0\.conv"
LAYERS = {
    "attention": (
        r"to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
        r"|to_qkv_mlp_proj|single_transformer_blocks\.\d+\.attn\.to_out"  # of FLUX.2
        r"|attentions\..*(proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)"  # of a UNet
    ),
    "feed_forward": (
        r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|(ff|ff_context)\.linear_(in|out)"
        r"|feed_forward\.(linear_[123]|w[123])"
    ),
    "spatial": _SPATIAL,
    "convolution": rf"{_SPATIAL}|conv_shortcut",
    "time": r"time_emb_proj|time_embedding\.linear_1|time_embedding\.linear_2",
    "input_output": r"conv_in|conv_out",
}


@register
class LoraAdapter(Adapter):
    """LoRA (Hu et al., arXiv 2106.09685): low-rank updates of the frozen layers.

    The adapted denoiser ``f`` is the backbone with weights ``theta + s * B A``; the update matrix
    ``B`` starts at zero, so the untrained adapter changes nothing.

    Args:
        network: the frozen denoiser, a UNet or a transformer of diffusers.
        rank: rank of the updates.
        alpha: the updates are scaled by ``alpha / rank``; equal to the rank if not given.
        layers: which layers are adapted, any of ``attention`` (in a UNet with the linear layers
            beside it), ``feed_forward``, ``spatial`` (3×3 convolutions), ``convolution`` (these and
            the 1×1 ones beside residual blocks), ``time`` and ``input_output``; the last four exist
            in a UNet only. The default adapts 2.95 % of the shipped backbones' parameters; in a
            transformer, the attention alone.

    Raises:
        InvDiffError: if a name in ``layers`` is unknown, or alpha is not above 0.
    """

    kind = "lora"

    def __init__(
        self,
        network: Any,
        rank: int = 2,
        alpha: float | None = None,
        layers: tuple[str, ...] = ("attention", "spatial", "time"),
    ) -> None:
        super().__init__(network)
        unknown = sorted(set(layers) - set(LAYERS))
        if unknown:
            raise InvDiffError(
                f"`adapter_settings.layers`: {unknown[0]!r} is unknown; expected some of "
                f"{', '.join(LAYERS)}.",
                "adapter_settings.layers",
            )
        if alpha is not None and not alpha > 0:
            raise InvDiffError(
                f"adapter_settings.alpha={alpha}: expected a number above 0, or none for the rank.",
                "adapter_settings.alpha",
            )
        self.rank = rank
        self.alpha = float(rank) if alpha is None else alpha
        self.layers = tuple(layers)
        pattern = "|".join(LAYERS[layer] for layer in self.layers)
        targets = [
            name
            for name, module in network.named_modules()
            if isinstance(_original(module), nn.Linear | nn.Conv2d)
            and re.search(rf"(^|\.)({pattern})$", name)
        ]
        config = LoraConfig(
            r=rank, lora_alpha=self.alpha, target_modules=targets, init_lora_weights=True
        )
        others = active_adapters(network)
        _with_peft(network).add_adapter(config, adapter_name=NAME)
        if others:
            activate_adapters(self.network, [*others, NAME])
        self._fused_scale: float | None = None
        self._frozen: dict[str, torch.Tensor] = {}

    @property
    def denoiser(self) -> nn.Module:
        """The network itself, which contains the update layers."""
        return self.network

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the update matrices."""
        return {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if f".{NAME}." in name
        }

    def prepare_training(self) -> None:
        """Hold the updates in single precision, whatever the precision of the network.

        If the network is in single precision, too, they are trained folded into the weights.
        """
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()  # half precision would lose small steps
        for layer in self._layers().values():
            train_folded(layer)

    def settings(self) -> dict[str, Any]:
        """Return the rank, the layers, and the alpha of saved files, which equals the rank."""
        return {"rank": self.rank, "alpha": float(self.rank), "layers": list(self.layers)}

    def set_scale(self, scale: float) -> None:
        """Scale the updates; at 0 they are not computed. Other LoRAs stay as they are."""
        active = {*active_adapters(self.network), NAME} - (set() if scale else {NAME})
        activate_adapters(
            self.network, [name for name in self.network.peft_config if name in active]
        )
        if scale != 0:
            for module in self._layers().values():
                module.set_scale(NAME, scale)

    @contextmanager
    def at_scale(self, scale: float) -> Iterator[None]:
        """Multiply the weight that ``set_adapters`` gave the updates, within the context.

        Other LoRAs stay as they are, and so do these updates if they are not active.

        Raises:
            InvDiffError: if the updates are fused into the weights, and the scale is not 1.
        """
        active, layers = active_adapters(self.network), self._layers().values()
        if scale == 1 or NAME not in active:
            yield
            return
        if any(layer.merged for layer in layers):
            raise InvDiffError(
                f"invariant_scale={scale}: the adapter is fused into the weights; call "
                "unfuse_lora() first, or leave the scale at 1."
            )
        weights = [layer.scaling[NAME] for layer in layers]
        if scale == 0:
            activate_adapters(self.network, [name for name in active if name != NAME])
        for layer, weight in zip(layers, weights, strict=True):
            layer.scaling[NAME] = scale * weight
        try:
            yield
        finally:
            activate_adapters(self.network, active)
            for layer, weight in zip(layers, weights, strict=True):
                layer.scaling[NAME] = weight

    def join(self) -> None:
        """Activate the updates beside the LoRAs that are active already."""
        if NAME not in (active := active_adapters(self.network)):
            activate_adapters(self.network, [NAME, *active])

    def detach(self) -> None:
        """Remove the update layers; other LoRAs stay."""
        self._unfuse()
        others = [name for name in active_adapters(self.network) if name != NAME]
        if set(self.network.peft_config) == {NAME}:
            self.network.unload_lora()
            return
        self.network.delete_adapters(NAME)
        activate_adapters(self.network, others)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the second matrix of each update by the factor."""
        for name, parameter in self.parameters().items():
            if ".lora_B." in name:
                parameter.mul_(factor)

    def enable_gradient_checkpointing(self) -> None:
        """Checkpoint the whole network, since the updates' gradients run through it."""
        self.network.enable_gradient_checkpointing()

    def frozen_weights(self) -> dict[str, torch.Tensor]:
        """Return the original weights, whatever is folded into them at present."""
        state = self.network.state_dict()
        if self._fused_scale:
            state |= {f"{n}.base_layer.weight": value for n, value in self._frozen.items()}
        return {
            name.replace(".base_layer.", "."): value
            for name, value in state.items()
            if ".lora_" not in name
        }

    @torch.no_grad()
    def updates(self) -> dict[str, torch.Tensor]:
        """Return what the updates add at scale 1 to the backbone's weights, float32, by name."""
        return {
            f"{name}.weight": layer.get_delta_weight(NAME).float()
            for name, layer in self._layers().items()
        }

    def save_weights(self, folder: Path) -> None:
        """Write the file that the stock pipeline's ``load_lora_weights`` takes.

        ``alpha / rank`` is folded into the second matrix of each update, and the file's alpha is
        its rank, so that programs which ignore alpha draw the same images.
        """
        state = get_peft_model_state_dict(self.network, adapter_name=NAME)
        config = {**self.network.peft_config[NAME].to_dict(), "lora_alpha": float(self.rank)}
        part = self._part
        writer = StableDiffusionPipeline if part == "unet" else StableDiffusion3Pipeline
        writer.save_lora_weights(
            str(folder),
            **{
                f"{part}_lora_layers": scaled(state, self.alpha / self.rank),
                f"{part}_lora_adapter_metadata": plain_config(config),
            },
        )
        sort_safetensors_header(folder / WEIGHTS_FILE)

    def load_weights(self, folder: Path) -> None:
        """Read the updates, whatever the file's alpha; no matrix may be missing."""
        file = folder / WEIGHTS_FILE
        stored = read_tensors(file, "rerun the adapter stage")
        state = {name.removeprefix(f"{self._part}."): value for name, value in stored.items()}
        expected = get_peft_model_state_dict(self.network, adapter_name=NAME)
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in expected.items()}:
            raise InvDiffError(f"{file} was made for another backbone: its layers do not match.")
        alpha = stored_alpha(file, self._part)
        if alpha is not None and alpha != self.alpha:
            state = scaled(state, alpha / self.alpha)
        set_peft_model_state_dict(self.network, state, adapter_name=NAME)

    @property
    def _part(self) -> str:
        """Name of the network in pipelines and LoRA files."""
        return "unet" if isinstance(self.network, UNet2DConditionModel) else "transformer"

    def prepare_sampling(self, pipeline: Any, scale: float) -> None:
        """Fold the scaled updates into the weights, so that sampling costs no more than before."""
        frozen_denoiser(pipeline).network = self.network
        self._fuse(scale)

    def _fuse(self, scale: float) -> None:
        if scale == self._fused_scale:
            return
        self._unfuse()
        self._fused_scale = None
        # Folding would leave other LoRAs out, and small updates are lost in quantised weights.
        if set(active_adapters(self.network)) - {NAME} or is_quantized(self.network):
            self.set_scale(scale)
            return
        self.set_scale(0.0 if scale == 0 else 1.0)
        if scale != 0:
            if not self._frozen:
                self._frozen = {
                    name: layer.get_parameter("weight").clone()
                    for name, layer in self._base_layers().items()
                }
            self.network.fuse_lora(lora_scale=scale, adapter_names=[NAME])
        self._fused_scale = scale

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Fold the updates into the weights; not in half precision, where rounding may lose them.

        The copy of the original weights is kept no longer than needed.
        """
        half = self.network.dtype != torch.float32 or torch.is_autocast_enabled(
            self.network.device.type
        )
        if half or self._fused_scale is not None:  # or put at a scale by prepare_sampling
            yield
            return
        self._fuse(1.0)
        try:
            yield
        finally:
            self._unfuse()
            self._frozen, self._fused_scale = {}, None

    @torch.no_grad()
    def _unfuse(self) -> None:
        """Remove the updates by copying the originals: subtracting would leave rounding errors."""
        if self._fused_scale:
            self.network.unfuse_lora()
            for name, layer in self._base_layers().items():
                layer.get_parameter("weight").copy_(self._frozen[name])

    def _base_layers(self) -> dict[str, nn.Module]:
        return {name: layer.get_base_layer() for name, layer in self._layers().items()}

    def _layers(self) -> dict[str, Any]:
        """The adapted layers, in peft's form."""
        return {
            name: module
            for name, module in self.network.named_modules()
            if isinstance(module, BaseTunerLayer) and NAME in module.scaling
        }


def active_adapters(network: nn.Module) -> list[str]:
    """Return the names of a network's active LoRAs, in the order in which they are computed."""
    layers = (module for module in network.modules() if isinstance(module, BaseTunerLayer))
    return list(next((layer.active_adapters for layer in layers), ()))


def activate_adapters(network: nn.Module, names: Sequence[str]) -> None:
    """Choose which LoRAs are computed, and in which order.

    Neither their weights nor which parameters are trainable changes.
    """
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            trainable = {p: p.requires_grad for p in module.parameters()}
            module.set_adapter(list(names), inference_mode=True)
            for parameter, value in trainable.items():
                parameter.requires_grad_(value)


def _with_peft(network: Any) -> Any:
    """Return the network with diffusers' LoRA methods, which only PixArt's lacks."""
    kind = type(network)
    if not issubclass(kind, PeftAdapterMixin):
        network.__class__ = type(kind.__name__, (kind, PeftAdapterMixin), {})
    return network


def _original(module: nn.Module) -> nn.Module:
    """Return the layer itself, which another LoRA may have wrapped."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
