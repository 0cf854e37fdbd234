"""Environments to compare with: a single one, random, the reference's, and the oracle's."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.noising import sample_losses
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.cli.lightning import build
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.environments.quality import conflicting
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, write_json

_BATCH = 128
# Settings of the reference's ascent, as far as METHOD states them; the rate and the weight of the
# least mass are not published.
EPOCHS = 500
LEARNING_RATE = 0.01
LEAST_WEIGHT = 1.0


def write_groups(kind: str, config: Path, folder: Path, seed: int) -> Path:
    """Write environments of a kind, in the form that the adapter stage reads.

    Args:
        kind: ``inferred`` (the run's own, nothing is written), ``one``, ``random``,
            ``reference``, ``oracle`` (attribute values) or ``oracle_minority`` (whether an image
            goes against the bias of its prompt).
        config: resolved settings of the run's adapter stage.
        folder: folder with one folder per kind; existing ones are kept.
        seed: seed of random groups and of the reference's draws.

    Returns:
        the folder of this kind.
    """
    data = build(["fit", f"--config={config}", "--trainer.logger=false"]).datamodule
    assert isinstance(data, BiasedDataModule)
    assert data.environments is not None
    if kind == "inferred":
        return data.environments
    target = folder / f"{kind}-{seed}"
    if (target / "environments.safetensors").is_file():
        return target
    tensors = _tensors(kind, data, seed)
    groups = int(tensors["assignments"].max()) + 1
    # For people only: training does not learn where environments come from.
    write_json(target / "environments.json", {"groups": groups, "made_by": kind})
    with atomic_path(target / "environments.safetensors") as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    return target


def _tensors(kind: str, data: BiasedDataModule, seed: int) -> dict[str, Tensor]:
    prompts = data.index.prompt_ids[data.index.rows("train")]
    if kind == "one":
        return {"assignments": torch.zeros_like(prompts)}
    if kind == "random":
        return {"assignments": shuffled_within(data.inferred().assignments, prompts, seed)}
    if kind.startswith("oracle"):
        attributes = data.labels("train")[1]
        if attributes is None:
            raise InvDiffError(f"row {kind}: {data.why_not_scored}; leave it out with --rows.")
        minority = kind == "oracle_minority"
        return {"assignments": conflicting(prompts, attributes).long() if minority else attributes}
    scores = reference_scores(data, seed)
    memberships = gradient_memberships(scores, data.inferred().groups)
    return {"assignments": memberships.argmax(1), "memberships": memberships}


def shuffled_within(assignments: Tensor, prompts: Tensor, seed: int) -> Tensor:
    """Shuffle environments within prompts, so that each keeps its number of images."""
    source = generator(seed, "random groups")
    shuffled = torch.empty_like(assignments)
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        shuffled[rows] = assignments[rows[torch.randperm(len(rows), generator=source)]]
    return shuffled


@torch.no_grad()
def reference_scores(data: BiasedDataModule, seed: int) -> Tensor:
    """Compute the reference's scores: ``mse(prediction, latent)`` at a random timestep and noise.

    Returns:
        float64 ``[N]``.
    """
    data.prepare_data()
    pipeline = load_pipeline(data.backbone)
    denoiser, conditions = frozen_denoiser(pipeline), data.conditions()
    process = denoiser.process
    scores = []
    count = len(data.index.rows("train"))
    for number, rows in enumerate(torch.arange(count).split(_BATCH)):
        batch = data.training_latents(rows)
        source = generator(seed, "reference scores", number)
        latents = denoiser.latents(batch["moments"])
        noise = torch.randn(latents.shape, generator=source)
        timesteps = torch.randint(process.train_timesteps, (len(rows),), generator=source)
        noisy = process.add_noise(latents, noise, timesteps)
        prediction = denoiser.predict(noisy, timesteps, conditions[batch["prompt"]])
        scores.append(sample_losses(prediction, latents).double())
    return torch.cat(scores)


def gradient_memberships(scores: Tensor, groups: int, seed: int = 0) -> Tensor:
    """Run the reference's ascent of the spread of group means, over all images at once.

    Adam optimises a dense ``[N, G]`` matrix of memberships from random ones, with the loss
    ``-std(L_g) - w min(l q)``; after each step rows are clamped to [0, 1] and made to sum to 1.

    Args:
        scores: ``[N]``.
        groups: number of groups G, at least 2.
        seed: seed of the memberships at the start.

    Returns:
        memberships, float32 ``[N, G]``, whose rows sum to 1.
    """
    values = scores.float()
    members = torch.rand(len(values), groups, generator=generator(seed, "memberships"))
    members = members / members.sum(1, keepdim=True)
    with torch.inference_mode(False), torch.enable_grad():
        members = members.clone().requires_grad_(True)
        values = values.clone()
        optimizer = torch.optim.Adam([members], lr=LEARNING_RATE)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            weighted = values[:, None] * members
            means = weighted.sum(0) / members.sum(0).clamp(min=1e-9)
            (-means.std() - LEAST_WEIGHT * weighted.min()).backward()
            optimizer.step()
            with torch.no_grad():
                members.clamp_(1e-9, 1)
                members /= members.sum(1, keepdim=True)
    return members.detach()
