"""One interface to the denoisers of all families of text-to-image models.

Each family is a subclass that says what its pipeline calls its parts and which arguments its
denoiser takes; nothing outside this package knows of families. Encoded prompts bear the names of
the pipelines' own arguments: ``prompt_embeds`` and, depending on the family,
``pooled_prompt_embeds`` and ``prompt_attention_mask``.
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

# Batch size of the text encoders.
_PROMPTS = 32


def in_precision(rows: Condition, dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert embeddings to a dtype; masks keep theirs."""
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in rows.items()}


def repeated(row: Condition, count: int, device: torch.device) -> dict[str, Tensor]:
    """Repeat one prompt's row ``count`` times, on a device."""
    return {n: v.to(device).expand(count, *v.shape[1:]) for n, v in row.items()}


def without_padding(rows: Condition) -> dict[str, Tensor]:
    """Cut off the last tokens that none of the prompts has, which masked attention never sees.

    Pipelines pad to 300 tokens. If a prompt has no token at all, attention sees its padding, so
    nothing is cut off.
    """
    mask = rows.get("prompt_attention_mask")
    if mask is None or not bool(mask.any(1).all()):
        return dict(rows)
    tokens = int(mask.any(0).nonzero().max()) + 1
    return {n: v[:, :tokens] if v.shape[:2] == mask.shape else v for n, v in rows.items()}


class FrozenDenoiser(ABC):
    """A pipeline's denoiser, with what comes before and after it.

    Made by :func:`invdiff_pl.backbones.families.frozen_denoiser`. The pipeline is used as it is, on
    its device.

    Args:
        pipe: a loaded diffusers pipeline of one of the classes in ``pipelines``.
        resolution: side of the images in pixels; the pipeline's own if not given.
    """

    pipelines: ClassVar[tuple[str, ...]]
    # ModelSpec's name for the model that a LoRA is made for.
    architecture: ClassVar[str]
    # Names of what `encode_prompt` returns, in order.
    encoded: ClassVar[tuple[str, ...]]
    # Side of a token in pixels of the latents, beside the patch_size of the network's config.
    token_side: ClassVar[int] = 1

    def __init__(self, pipe: Any, resolution: int | None = None) -> None:
        self.pipe = pipe
        # The pipeline's name for its denoiser, `unet` or `transformer`.
        self.part = denoiser_part(self.stock.__name__)
        self.resolution = self.own_resolution if resolution is None else resolution

    @cached_property
    def process(self) -> NoiseProcess:
        """How the scheduler noises latents, and what the denoiser should predict."""
        return noise_process(self.pipe.scheduler.config, self.tokens)

    @property
    def network(self) -> Any:
        """The denoiser itself, a diffusers module, or whatever replaces it."""
        return getattr(self.pipe, self.part)

    @network.setter
    def network(self, network: Any) -> None:
        setattr(self.pipe, self.part, network)

    @cached_property
    def stock(self) -> Any:
        """The supported diffusers class of the pipeline, which may be of a subclass of it."""
        kinds = ((kind.__name__, kind) for kind in type(self.pipe).__mro__)
        return next(kind for name, kind in kinds if name in self.pipelines)

    @cached_property
    def call_parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the stock pipeline's call."""
        return inspect.signature(self.stock.__call__).parameters

    @property
    def other_networks(self) -> list[nn.Module]:
        """The pipeline's other networks: autoencoder and text encoders."""
        parts = self.pipe.components.items()
        return [part for name, part in parts if name != self.part and isinstance(part, nn.Module)]

    @property
    def own_resolution(self) -> int:
        """Side in pixels of the images that the pipeline draws by default."""
        size = self.network.config.sample_size
        return int((size if isinstance(size, int) else size[0]) * self.pipe.vae_scale_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of an image's latents."""
        side = self.resolution // self.pipe.vae_scale_factor
        return int(self.network.config.in_channels), side, side

    @property
    def tokens(self) -> int:
        """Number of a transformer's image tokens, or of pixels of a UNet's latents."""
        _, height, width = self.latent_shape
        patch = self.token_side * (self.network.config.get("patch_size") or 1)
        return int(height // patch * (width // patch))

    def image_tokens(self, output: Any) -> Any:
        """Drop the text's tokens from a block's output, if the family has both in one sequence."""
        return output

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scale latents for the denoiser, see ``backbones.latents.scaled_latents``."""
        return scaled_latents(self.pipe.vae.config, moments, noise)

    def decoded(self, latents: Tensor) -> Tensor:
        """Decode latents in the denoiser's scale to float32 images ``[B, 3, H, W]`` in [-1, 1]."""
        vae = self.pipe.vae
        images: Tensor = vae.decode(self._unscaled(latents.float()).to(vae.dtype)).sample
        return images.float().clamp(-1, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Invert :meth:`latents`, for latents without a variance."""
        return unscaled_latents(self.pipe.vae.config, latents)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode P prompts for the denoiser, one row each, on the text encoders' device.

        An empty prompt gives the unconditional input of this family's classifier-free guidance.
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
        """Call the pipeline's ``encode_prompt`` with the defaults of the pipeline's own call.

        They may differ from the defaults of the method.
        """
        call = self.call_parameters
        given: dict[str, Any] = {
            "prompt_2": None,  # further text encoders get the same prompts as the first
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
        """Predict the noise process's target.

        Args:
            noisy: latents ``[B, C, h, w]``.
            timesteps: timesteps of the process, int64 ``[B]``.
            condition: rows of :meth:`condition`, one per image.
            network: network to call instead of the pipeline's own, such as the adapted one.

        Returns:
            ``[B, C, h, w]``, in the denoiser's dtype, or autocast's.
        """
        called = self.network if network is None else network
        dtype = self._dtype(called)
        given = in_precision(condition, dtype)
        return self._call(called, noisy.to(dtype), self.process.time(timesteps), given)

    def _dtype(self, network: Any) -> torch.dtype:
        """Return the dtype a network computes in, which its parameters hide if it is quantised."""
        dtype: torch.dtype = torch.bfloat16 if self._quantized else network.dtype
        return dtype

    @cached_property
    def _quantized(self) -> bool:
        return is_quantized(self.network)

    @abstractmethod
    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        """Return the network's prediction in the shape of the latents."""

    def initial_noise(self, indices: Sequence[int], seed: int) -> tuple[Tensor, list[Any]]:
        """Draw the starting noise of the samples with the given global indices.

        Each sample has its own generator, seeded by (seed, index), so that it does not depend on
        which samples share its batch or on the number of ranks.

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
        """Draw samples from starting noise with the stock pipeline call.

        Args:
            condition: rows of :meth:`condition`, one per sample.
            null: the row of the empty prompt.
            noise: ``[B, C, h, w]``.
            generators: one per sample.
            steps: number of denoising steps.
            guidance_scale: scale of classifier-free guidance; 1 switches it off.
            output_type: ``pt`` for images in [0, 1], ``[B, 3, H, W]``; or ``latent``.
            options: further arguments of the pipeline's call, such as ``callback_on_step_end``.
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
        """Return the pipeline call's arguments for the given conditions."""
        return given

    def _guidance(self, scale: float) -> dict[str, float]:
        """Return the pipeline call's arguments for a guidance scale, where 1 means no guidance."""
        return {"guidance_scale": scale}

    def _packed(self, latents: Tensor) -> Tensor:
        """Bring latents ``[B, C, h, w]`` into the form that the pipeline's call takes."""
        return latents

    def _unpacked(self, latents: Tensor) -> Tensor:
        """Bring the latents that the pipeline's call returns into the form ``[B, C, h, w]``."""
        return latents
