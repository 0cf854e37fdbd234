import inspect
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_families import FAMILIES as TINY
from tiny_families import PROMPTS, flux, made
from torch import Tensor

from invdiff_pl.backbones.check import FAMILIES as SUPPORTED
from invdiff_pl.backbones.check import is_flow
from invdiff_pl.backbones.families import FAMILIES, frozen_denoiser
from invdiff_pl.backbones.latents import encoded_moments
from invdiff_pl.backbones.noising import FlowProcess, noise_process, sample_losses
from invdiff_pl.utils.errors import InvDiffError

TEXT = [PROMPTS[0], "", PROMPTS[1]]


@pytest.fixture(scope="module", params=list(TINY))
def pipe(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def rows(condition: dict[str, Tensor], chosen: list[int]) -> dict[str, Tensor]:
    return {name: value[chosen] for name, value in condition.items()}


def test_each_family_has_a_tiny_pipeline() -> None:
    assert len(TINY) == len(FAMILIES)
    assert {type(made(name)).__name__ for name in TINY} <= set(SUPPORTED)


def test_what_is_checked_without_torch_and_what_is_called_are_the_same_pipelines() -> None:
    assert [name for kind in FAMILIES for name in kind.pipelines] == list(SUPPORTED)


def test_a_pipeline_of_no_family_is_named() -> None:
    with pytest.raises(InvDiffError, match="a dict is not supported; expected one of StableDiff"):
        frozen_denoiser({})


def stock(pipe: Any, **settings: Any) -> Tensor:
    """What the pipeline itself draws, of 32×32 images."""
    if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
        settings["use_resolution_binning"] = False
    images: Tensor = pipe(height=32, width=32, **settings).images
    return images


def test_the_network_is_called_as_the_stock_pipeline_calls_it(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = frozen_denoiser(pipe, 32)
    calls: list[tuple[dict[str, Any], Any]] = []

    def note(network: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        named = zip(inspect.signature(network.forward).parameters, args, strict=False)
        calls.append(({**dict(named), **kwargs}, output[0]))

    noise, sources = denoiser.initial_noise([0], seed=0)
    settings = {"latents": denoiser._packed(noise), "generator": sources, "output_type": "latent"}
    with denoiser.network.register_forward_hook(note, with_kwargs=True):
        stock(pipe, prompt=PROMPTS[0], num_inference_steps=1, **settings)
        given, output = calls[0]
        guided = len(output) == 2
        order = [0, 1] if isinstance(output, list) else [1, 0]  # Z-Image's has the prompt first
        condition = rows(denoiser.condition(TEXT), order if guided else [0])
        latents = next(given[name] for name in ("hidden_states", "sample", "x") if name in given)
        if isinstance(latents, list):
            latents, output = torch.stack(latents).squeeze(2), torch.stack(output)
        monkeypatch.setattr(denoiser.process, "time", lambda time: time)
        time = _of_thousand(pipe, given["timestep" if "timestep" in given else "t"]).reshape(-1)[:1]
        denoiser.predict(_latent(pipe, latents), time.expand(len(latents)), condition)
    again = calls[-1][1]
    again = torch.stack(again) if isinstance(again, list) else again
    torch.testing.assert_close(again, output, rtol=0, atol=1e-5)


def _of_thousand(pipe: Any, time: Tensor) -> Tensor:
    """The scheduler's timestep, of what the pipeline gives its network."""
    name = type(pipe).__name__
    if name in ("Lumina2Pipeline", "ZImagePipeline"):
        return 1000 * (1 - time)
    return 1000 * time if name.startswith("Flux") else time


def _latent(pipe: Any, given: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]``, of what the pipeline gives its network."""
    if given.dim() == 4:
        return given
    grid = given.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    return torch.nn.functional.pixel_shuffle(grid, 2)


def test_drawing_is_the_stock_pipelines(pipe: Any) -> None:
    denoiser = frozen_denoiser(pipe, 32)
    noise, sources = denoiser.initial_noise([3, 5], seed=1)
    condition = denoiser.condition(TEXT)
    given = rows(condition, [0, 2]), rows(condition, [1])
    ours = denoiser.draw(*given, noise, sources, steps=2, guidance_scale=4.0)
    drawn = stock(
        pipe,
        prompt=list(PROMPTS),  # which some change
        latents=denoiser._packed(noise),
        generator=denoiser.initial_noise([3, 5], seed=1)[1],
        num_inference_steps=2,
        # Z-Image's is what is added to a prediction.
        guidance_scale=3.0 if type(pipe).__name__ == "ZImagePipeline" else 4.0,
        output_type="pt",
    )
    torch.testing.assert_close(ours, drawn, rtol=0, atol=1e-5)
    assert ours.shape == (2, 3, 32, 32)


def test_a_condition_does_not_depend_on_the_prompts_beside_it(pipe: Any) -> None:
    denoiser = frozen_denoiser(pipe, 32)
    together, alone = denoiser.condition(TEXT), denoiser.condition([PROMPTS[1]])
    for name, value in alone.items():
        torch.testing.assert_close(together[name][2:], value)
    empty = denoiser.condition([""])
    for name, value in empty.items():
        torch.testing.assert_close(together[name][1:2], value)


def test_latents_are_what_the_pipeline_decodes(pipe: Any) -> None:
    denoiser = frozen_denoiser(pipe, 32)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = encoded_moments(pipe.vae, images)
    latents = denoiser.latents(moments)
    back = _decodable(pipe, latents)
    torch.testing.assert_close(back, moments.chunk(2, dim=1)[0], atol=1e-5, rtol=1e-4)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    deviation = _decodable(pipe, denoiser.latents(moments, noise)) - back
    expected = noise * torch.exp(0.5 * moments.chunk(2, dim=1)[1])
    torch.testing.assert_close(deviation, expected, atol=1e-5, rtol=1e-4)
    assert latents.shape[1:] == denoiser.latent_shape


def _decodable(pipe: Any, latents: Tensor) -> Tensor:
    """What the pipeline's autoencoder is given for latents."""
    config = pipe.vae.config
    if type(pipe).__name__ != "Flux2KleinPipeline":
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    statistics = pipe.vae.bn
    deviation = (statistics.running_var + config.batch_norm_eps).sqrt()
    packed = pipe._patchify_latents(latents)
    packed = packed * deviation[:, None, None] + statistics.running_mean[:, None, None]
    unpacked: Tensor = pipe._unpatchify_latents(packed)
    return unpacked


def test_gradients_reach_the_network_that_is_called(pipe: Any) -> None:
    denoiser = frozen_denoiser(pipe, 32)
    noise, _ = denoiser.initial_noise([0], seed=0)
    layers = denoiser.network.modules()
    weight: Any = next(layer.weight for layer in layers if isinstance(layer, torch.nn.Linear))
    weight.requires_grad_(True)
    try:
        given = denoiser.condition([PROMPTS[0]])
        denoiser.predict(noise, torch.tensor([400]), given).square().sum().backward()
        assert float(weight.grad.abs().sum()) > 0
    finally:
        weight.requires_grad_(False).grad = None


def test_losses_are_those_of_the_training_scripts(pipe: Any) -> None:
    """SD3's and FLUX's: sigmas looked up by timestep, the error of ``noise - latents``.

    Stable Diffusion's, SDXL's and PixArt's: DDPM's noise, the error of noise or velocity.
    """
    denoiser = frozen_denoiser(pipe, 32)
    latents, noise = torch.randn(2, 3, *denoiser.latent_shape).unbind()
    timesteps, given = torch.tensor([5, 500, 998]), denoiser.condition(TEXT)
    if is_flow(pipe.scheduler.config):
        scheduler = _sampled_everywhere(pipe, denoiser.tokens)
        sigmas = scheduler.sigmas[:-1].flip(0)[timesteps].view(-1, 1, 1, 1)
        noisy, wanted = (1 - sigmas) * latents + sigmas * noise, noise - latents
    else:
        kept = _kept_signal(pipe.scheduler.config)[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        wanted = velocity if pipe.scheduler.config.prediction_type == "v_prediction" else noise
    found = denoiser.process.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(found, noisy, atol=1e-5, rtol=1e-4)
    predicted = denoiser.predict(noisy, timesteps, given)
    expected = (predicted - wanted).square().mean((1, 2, 3))
    target = denoiser.process.target(latents, noise, timesteps)
    torch.testing.assert_close(sample_losses(predicted, target), expected, atol=1e-5, rtol=1e-4)


def _kept_signal(config: Any) -> Tensor:
    """abar of each timestep, from the betas."""
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000)
    linear = torch.linspace(config.beta_start, config.beta_end, 1000)
    kept = (1 - (roots.square() if config.beta_schedule == "scaled_linear" else linear)).cumprod(0)
    if not config.get("rescale_betas_zero_snr"):
        return kept
    root = kept.sqrt()  # moved and stretched so that the last is 0 (Lin et al., arXiv 2305.08891)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def _sampled_everywhere(pipe: Any, tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler, made to sample at every timestep that it was trained at."""
    config = pipe.scheduler.config
    shift = config.get("shift", config.get("flow_shift"))
    dynamic = bool(config.get("use_dynamic_shifting"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    steps = (torch.arange(1000, 0, -1) / 1000).tolist()
    # FLUX.1: mu rises from 0.5 at 256 tokens to 1.15 at 4096.
    mu = 0.5 + 0.65 * (tokens - 256) / (4096 - 256)
    if type(pipe).__name__ == "Flux2KleinPipeline":
        # On a line between its values for 10 steps and for 200, at the default of 50.
        few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
        mu = few + (many - few) * (50 - 10) / (200 - 10)
    scheduler.set_timesteps(sigmas=steps, **({"mu": mu} if dynamic else {}))
    return scheduler


def test_a_flow_without_noise_guidance_embedding_is_called_without_one() -> None:
    with torch.random.fork_rng():
        pipe = flux(guidance=False)
    denoiser = frozen_denoiser(pipe, 32)
    noise, _ = denoiser.initial_noise([0], seed=0)
    assert (
        denoiser.predict(noise, torch.tensor([9]), denoiser.condition(["a"])).shape == noise.shape
    )


def test_the_noise_of_a_sample_does_not_depend_on_those_beside_it(pipe: Any) -> None:
    denoiser = frozen_denoiser(pipe, 32)
    together = denoiser.initial_noise([4, 9], seed=2)[0]
    assert torch.equal(together[1:], denoiser.initial_noise([9], seed=2)[0])
    assert not torch.equal(together[0], together[1])


def test_signal_to_noise_of_a_flow_is_the_ratio_of_variances() -> None:
    flow = FlowProcess({"num_train_timesteps": 4, "shift": 1.0}, tokens=1)
    found = flow.signal_to_noise(torch.arange(4))  # sigma 1/4, 1/2, 3/4, 1
    torch.testing.assert_close(found, torch.tensor([9.0, 1.0, 1 / 9, 0.0]))


def test_diffusion_is_told_from_flow_by_the_scheduler() -> None:
    assert noise_process(DDPMScheduler().config).prediction_type == "epsilon"
    assert noise_process(made("sana").scheduler.config, 256).prediction_type == "flow"
