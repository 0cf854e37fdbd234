"""The forward process and the training target of a diffusers scheduler: diffusion or flow."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from invdiff_pl.backbones.check import PREDICTION_TYPES, is_flow
from invdiff_pl.utils.errors import InvDiffError


class NoiseProcess(Protocol):
    """Noises latents and gives targets at T timesteps, from little noise (0) to much (T - 1)."""

    prediction_type: str

    @property
    def train_timesteps(self) -> int:
        """Number of timesteps T."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ``z_t`` for latents and noise ``[B, C, H, W]`` and timesteps ``[B]``."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict, ``[B, C, H, W]``."""

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio at each timestep, float32 ``[B]``."""

    def time(self, timesteps: Tensor) -> Tensor:
        """Return the scheduler's own numbers for the timesteps when it samples, ``[B]``."""


def noise_process(
    config: Mapping[str, Any], tokens: int = 4096, shift: float | None = None
) -> NoiseProcess:
    """Return the forward process that a scheduler's configuration describes.

    Args:
        config: configuration of any diffusers scheduler.
        tokens: number of the denoiser's image tokens, on which a dynamic shift of flow matching
            depends.
        shift: logarithm of a dynamic shift; FLUX.1's function of the tokens if not given.

    Raises:
        InvDiffError: if the prediction type is not supported.

    Example:
        >>> from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
        >>> noise_process(DDPMScheduler().config).prediction_type
        'epsilon'
        >>> flow = noise_process(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
        >>> flow.time(torch.tensor([499, 999]))  # 3 u / (1 + 2 u) of 1000, at u = 0.5 and 1
        tensor([ 750., 1000.])
    """
    if is_flow(config):
        return FlowProcess(config, tokens, shift)
    return ForwardProcess(config)


def timestep_at(process: NoiseProcess, log_snr: float) -> int:
    """Find the timestep whose logarithmic signal-to-noise ratio is nearest to a level.

    A level means the same amount of noise under any schedule: it is ``log(abar / (1 - abar))`` for
    diffusion and ``2 log((1 - sigma) / sigma)`` for flow matching.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> flow = noise_process(FlowMatchEulerDiscreteScheduler().config)
        >>> timestep_at(flow, 0.0)  # as much signal as noise
        499
    """
    every = process.signal_to_noise(torch.arange(process.train_timesteps)).double().log()
    return int((every - log_snr).abs().nan_to_num(torch.inf).argmin())


class ForwardProcess:
    """Noises latents and gives targets, as the scheduler's configuration defines them.

    Args:
        scheduler_config: the ``config`` of the backbone's diffusers scheduler, of any class.

    Raises:
        InvDiffError: if the prediction type is not epsilon, v_prediction or sample.
    """

    def __init__(self, scheduler_config: FrozenDict) -> None:
        self._scheduler = DDPMScheduler.from_config(scheduler_config)
        self.prediction_type: str = self._scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise InvDiffError(
                f"prediction_type {self.prediction_type!r} of the backbone's scheduler is not "
                f"supported: expected one of {', '.join(PREDICTION_TYPES)}."
            )

    @property
    def train_timesteps(self) -> int:
        """Number of timesteps T of the forward process."""
        return int(self._scheduler.config.num_train_timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ``z_t`` for latents and noise ``[B, C, H, W]`` and timesteps ``[B]``."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict, ``[B, C, H, W]``: noise, velocity or latents."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        velocity: Tensor = self._scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio per timestep, float32 ``[B]``; 0 at a zero-SNR end."""
        alphas = self._scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas / (1 - alphas)

    def time(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps themselves."""
        return timesteps


class FlowProcess:
    """Flow matching (Lipman et al., arXiv 2210.02747): ``z = (1 - sigma) x + sigma eps``.

    The target is ``eps - x``. Timestep t stands for ``sigma = s u / (1 + (s - 1) u)`` at
    ``u = (t + 1) / T``, s being the scheduler's shift, which may depend on the number of tokens
    (Esser et al., arXiv 2403.03206).

    Args:
        config: configuration of a diffusers scheduler for flow matching or with flow sigmas.
        tokens: number of the denoiser's image tokens.
        shift: logarithm of a dynamic shift; FLUX.1's function of the tokens if not given.
    """

    prediction_type = "flow"

    def __init__(self, config: Mapping[str, Any], tokens: int, shift: float | None = None) -> None:
        steps = int(config.get("num_train_timesteps", 1000))
        parts = torch.arange(1, steps + 1, dtype=torch.float32) / steps
        if config.get("use_dynamic_shifting"):
            mu = _shift(config, tokens) if shift is None else shift
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
            self._sigmas: Tensor = scheduler.time_shift(mu, 1.0, parts)
        else:
            static = float(config.get("shift", config.get("flow_shift", 1.0)))
            self._sigmas = static * parts / (1 + (static - 1) * parts)

    @property
    def train_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self._sigmas)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ``z_t`` for latents and noise ``[B, C, H, W]`` and timesteps ``[B]``."""
        sigmas = self._at(timesteps).to(latents.dtype)
        sigmas = sigmas.reshape(-1, *[1] * (latents.dim() - 1))
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the flow's velocity, ``[B, C, H, W]``."""
        return noise - latents

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio at each timestep, float32 ``[B]``; 0 at the last."""
        sigmas = self._at(timesteps)
        return ((1 - sigmas) / sigmas).square()

    def time(self, timesteps: Tensor) -> Tensor:
        """Return ``T sigma``, float32 ``[B]``."""
        return self.train_timesteps * self._at(timesteps)

    def _at(self, timesteps: Tensor) -> Tensor:
        self._sigmas = self._sigmas.to(timesteps.device)  # once, since copies wait for the device
        return self._sigmas[timesteps]


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """Compute the logarithm of FLUX.1's dynamic shift, which rises with the number of tokens."""
    shift: float = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return shift


def predict(denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
    """Call a denoiser on latents and embeddings converted to its dtype.

    Args:
        denoiser: a ``UNet2DConditionModel``, or anything with the same call and a ``dtype``.
        noisy: latents ``[B, C, H, W]``.
        timesteps: int64 ``[B]``.
        embeddings: text embeddings ``[B, L, D]``.

    Returns:
        ``[B, C, H, W]``, in the denoiser's dtype, or autocast's.
    """
    dtype = denoiser.dtype
    given = noisy.to(dtype), timesteps, embeddings.to(dtype)
    prediction: Tensor = denoiser(*given, return_dict=False)[0]
    return prediction


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute per-sample losses, mean squares over channels and pixels, float32 ``[B]``."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
