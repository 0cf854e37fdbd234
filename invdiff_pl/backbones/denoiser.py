"""One interface to the denoisers of all families of text-to-image models.

A family is a class here that says how its pipeline names its parts, and what its denoiser is called
with; nothing outside this room knows families. Names of what a prompt becomes are those of the
pipelines' own calls: ``prompt_embeds`` and, by family, ``pooled_prompt_embeds`` and
``prompt_attention_mask``.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers.utils import is_bs4_available
from torch import Tensor, nn

from invdiff_pl.backbones.check import denoiser_part
from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.latents import scaled_latents, unscaled_latents
from invdiff_pl.backbones.noising import NoiseProcess, noise_process
from invdiff_pl.backbones.quantized import is_quantized

Condition = Mapping[str, Tensor]

# Prompts that text encoders see at once.
_PROMPTS = 32


def in_precision(rows: Condition, dtype: torch.dtype) -> dict[str, Tensor]:
    """Embeddings in a precision; masks stay what they are."""
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in rows.items()}


def repeated(row: Condition, count: int, device: torch.device) -> dict[str, Tensor]:
    """One prompt's row as so many, on a device."""
    return {n: v.to(device).expand(count, *v.shape[1:]) for n, v in row.items()}


def without_padding(rows: Condition) -> dict[str, Tensor]:
    """Rows less the last tokens that none of the prompts has, which masked attention never sees.

    Pipelines pad to 300 tokens. Where a prompt has none at all, attention sees its padding, and
    nothing is left out.
    """
    mask = rows.get("prompt_attention_mask")
    if mask is None or not bool(mask.any(1).all()):
        return dict(rows)
    tokens = int(mask.any(0).nonzero().max()) + 1
    return {n: v[:, :tokens] if v.shape[:2] == mask.shape else v for n, v in rows.items()}


class FrozenDenoiser(ABC):
    """A pipeline's denoiser with what it needs before and after it.

    Made by :func:`invdiff_pl.backbones.families.frozen_denoiser`. The pipeline is used as it is, on
    its device.

    Args:
        pipe: a loaded pipeline of diffusers, of one of the ``pipelines``.
        resolution: side of the images in pixels; the pipeline's own if not given.
    """

    pipelines: ClassVar[tuple[str, ...]]
    # As ModelSpec names what a LoRA is for.
    architecture: ClassVar[str]
    # What `encode_prompt` returns.
    encoded: ClassVar[tuple[str, ...]]

    def __init__(self, pipe: Any, resolution: int | None = None) -> None:
        self.pipe = pipe
        # What the pipeline calls it, `unet` or `transformer`.
        self.part = denoiser_part(self.stock.__name__)
        self.resolution = self.own_resolution if resolution is None else resolution

    @cached_property
    def process(self) -> NoiseProcess:
        """How the scheduler noises latents, and what the denoiser should predict."""
        return noise_process(self.pipe.scheduler.config, self.tokens)

    @property
    def network(self) -> Any:
        """The denoiser itself, a module of diffusers, or what stands in its place."""
        return getattr(self.pipe, self.part)

    @network.setter
    def network(self, network: Any) -> None:
        setattr(self.pipe, self.part, network)

    @cached_property
    def stock(self) -> Any:
        """The class of diffusers, whatever subclass of it the pipeline is of."""
        kinds = ((kind.__name__, kind) for kind in type(self.pipe).__mro__)
        return next(kind for name, kind in kinds if name in self.pipelines)

    @cached_property
    def call_parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the stock pipeline's call."""
        return inspect.signature(self.stock.__call__).parameters

    @property
    def other_networks(self) -> list[nn.Module]:
        """The pipeline's networks beside the denoiser: autoencoder and text encoders."""
        parts = self.pipe.components.items()
        return [part for name, part in parts if name != self.part and isinstance(part, nn.Module)]

    @property
    def own_resolution(self) -> int:
        """Side of the images that the pipeline draws, in pixels."""
        size = self.network.config.sample_size
        return int((size if isinstance(size, int) else size[0]) * self.pipe.vae_scale_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of an image's latents."""
        side = self.resolution // self.pipe.vae_scale_factor
        return int(self.network.config.in_channels), side, side

    @property
    def tokens(self) -> int:
        """Image tokens of a transformer, pixels of a UNet's latents."""
        _, height, width = self.latent_shape
        patch = self.network.config.get("patch_size", 1) or 1
        return int(height // patch * (width // patch))

    def image_tokens(self, output: Any) -> Any:
        """A block's output less the text's tokens, where a family has both in one sequence."""
        return output

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents as the denoiser takes them, see ``backbones.latents.scaled_latents``."""
        return scaled_latents(self.pipe.vae.config, moments, noise)

    def decoded(self, latents: Tensor) -> Tensor:
        """Images of latents as the denoiser takes them: float32 ``[B, 3, H, W]`` in [-1, 1]."""
        vae = self.pipe.vae
        images: Tensor = vae.decode(self._unscaled(latents.float()).to(vae.dtype)).sample
        return images.float().clamp(-1, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`latents`, for latents without a variance."""
        return unscaled_latents(self.pipe.vae.config, latents)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser is given for P prompts, a row each, on the text encoders' device.

        An empty prompt is what classifier-free guidance of this family starts from.
        """
        texts = [prompt for prompt in prompts if prompt]
        chunks = [
            self._encode_prompts(texts[n : n + _PROMPTS]) for n in range(0, len(texts), _PROMPTS)
        ]
        if len(texts) < len(prompts):
            chunks.append(self._encode_nothing())
        rows = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        numbers = iter(range(len(texts)))
        order = [next(numbers) if prompt else len(texts) for prompt in prompts]
        return {name: value[order] for name, value in rows.items()}

    def _encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = zip(self.encoded, self._encode(list(prompts)), strict=True)
        return {name: each for name, each in found if not name.startswith(("negative_", "_"))}

    def _encode_nothing(self) -> dict[str, Tensor]:
        found = zip(self.encoded, self._encode([""]), strict=True)
        return {
            name.removeprefix("negative_"): each
            for name, each in found
            if name.startswith("negative_")
        }

    def _encode(self, prompts: list[str]) -> Sequence[Tensor]:
        """What the pipeline's ``encode_prompt`` returns for prompts, with the defaults of a call.

        Those of a call may differ from the method's own.
        """
        call = self.call_parameters
        given: dict[str, Any] = {
            "prompt_2": None,  # of further text encoders, the same as the first's
            "prompt_3": None,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            **{name: each.default for name, each in call.items()},
            "prompt": prompts,
            "device": self.pipe._execution_device,
        }
        if not is_bs4_available():  # the pipeline would do the same, with warnings
            given["clean_caption"] = False
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        found: Sequence[Tensor] = self.pipe.encode_prompt(
            **{name: value for name, value in given.items() if name in taken}
        )
        return found

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, network: Any = None
    ) -> Tensor:
        """A prediction of the process's target.

        Args:
            noisy: latents ``[B, C, h, w]``.
            timesteps: int64 ``[B]``, as of the process.
            condition: rows of :meth:`condition`, one an image.
            network: called instead of the pipeline's own, such as the adapted one.

        Returns:
            ``[B, C, h, w]``, in the denoiser's dtype, or autocast's.
        """
        called = self.network if network is None else network
        dtype = self._dtype(called)
        given = in_precision(condition, dtype)
        return self._call(called, noisy.to(dtype), self.process.time(timesteps), given)

    def _dtype(self, network: Any) -> torch.dtype:
        """That a network computes in; quantised, its parameters tell of what is beside it, too."""
        dtype: torch.dtype = torch.bfloat16 if self._quantized else network.dtype
        return dtype

    @cached_property
    def _quantized(self) -> bool:
        return is_quantized(self.network)

    @abstractmethod
    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        """The network's prediction, latent-shaped."""

    def initial_noise(self, indices: Sequence[int], seed: int) -> tuple[Tensor, list[Any]]:
        """Starting noise of the samples with the given global indices.

        Each sample has a generator of its own, seeded by (seed, index), so that a sample does not
        depend on which others share its batch or on the number of ranks.

        Returns:
            float32 ``[B, C, h, w]`` on the CPU, and the generators, for schedulers that draw noise
            while sampling.
        """
        sources = [generator(seed, "sample", index) for index in indices]
        drawn = [torch.randn(self.latent_shape, generator=source) for source in sources]
        return torch.stack(drawn), sources

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        null: Condition,
        noise: Tensor,
        generators: Sequence[Any],
        *,
        steps: int,
        guidance_scale: float,
        output_type: str = "pt",
        **options: Any,
    ) -> Tensor:
        """What the stock pipeline call makes of starting noise.

        Args:
            condition: rows of :meth:`condition`, one a sample.
            null: of the empty prompt, one row.
            noise: ``[B, C, h, w]``.
            generators: one a sample.
            steps: denoising steps.
            guidance_scale: 1 switches guidance off.
            output_type: ``pt`` for images in [0, 1], ``[B, 3, H, W]``; ``latent``.
            options: further ones of the pipeline's call, such as ``callback_on_step_end``.
        """
        device = self.pipe._execution_device
        if not torch.is_autocast_enabled(device.type):
            dtype = self._dtype(self.network)
            condition, null = in_precision(condition, dtype), in_precision(null, dtype)
        given = {name: value.to(device) for name, value in condition.items()}
        nothing = repeated(null, len(noise), device)
        given |= {f"negative_{name}": value for name, value in nothing.items()}
        drawn: Tensor = self.pipe(
            **self._drawing(given),
            **self._guidance(guidance_scale),
            latents=self._packed(noise).to(device, condition["prompt_embeds"].dtype),
            generator=list(generators),
            num_inference_steps=steps,
            height=self.resolution,
            width=self.resolution,
            output_type=output_type,
            **options,
        ).images
        return self._unpacked(drawn) if output_type == "latent" else drawn

    def _drawing(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the pipeline's call, of those that all families could take."""
        return given

    def _guidance(self, scale: float) -> dict[str, float]:
        """Arguments of the pipeline's call that stand for a guidance scale; at 1 there is none."""
        return {"guidance_scale": scale}

    def _packed(self, latents: Tensor) -> Tensor:
        """Latents as the pipeline's call takes them."""
        return latents

    def _unpacked(self, latents: Tensor) -> Tensor:
        """Latents of the pipeline's call, ``[B, C, h, w]``."""
        return latents
