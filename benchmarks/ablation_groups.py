"""Environments to compare with: one, random, the reference's, and the oracle's."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.noising import ForwardProcess, sample_losses, sample_posterior
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.cli.lightning import build
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.environments.assignment import assign
from invdiff_pl.environments.quality import conflicting
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, read_json, write_json

_BATCH = 128


def write_groups(kind: str, config: Path, folder: Path, seed: int) -> Path:
    """Write environments of a kind, in the form that the adapter stage reads.

    Args:
        kind: ``inferred`` (the run's own, nothing is written), ``one``, ``random``,
            ``reference``, ``oracle`` (attribute values) or ``oracle_minority`` (whether an image
            goes against the bias of its prompt).
        config: the run's adapter stage, resolved.
        folder: holds one folder a kind; what is there is kept.
        seed: of random groups and of the reference's draws.

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
    facts = read_json(data.environments / "environments.json")
    kept = {n: facts[n] for n in ("timesteps", "timestep_weights") if n in facts}
    groups = int(tensors["assignments"].max()) + 1
    # Training is told nothing of where they come from; people are.
    write_json(target / "environments.json", {**kept, "groups": groups, "made_by": kind})
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
    found = assign(scores, prompts, data.inferred().groups, method="gradient")
    return {"assignments": found.assignments, "memberships": found.memberships.float()}


def shuffled_within(assignments: Tensor, prompts: Tensor, seed: int) -> Tensor:
    """The same number of images in each (prompt, environment), chosen at random."""
    source = generator(seed, "random groups")
    shuffled = torch.empty_like(assignments)
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        shuffled[rows] = assignments[rows[torch.randperm(len(rows), generator=source)]]
    return shuffled


@torch.no_grad()
def reference_scores(data: BiasedDataModule, seed: int) -> Tensor:
    """The reference's score: one random timestep and noise an image, ``mse(prediction, latent)``.

    Returns:
        float64 ``[N]``.
    """
    data.prepare_data()
    pipeline = load_pipeline(data.backbone)
    process = ForwardProcess(pipeline.scheduler.config)
    embeddings = data.prompt_embeddings()
    scores = []
    count = len(data.index.rows("train"))
    for number, rows in enumerate(torch.arange(count).split(_BATCH)):
        batch = data.training_latents(rows)
        source = generator(seed, "reference scores", number)
        latents = sample_posterior(batch["moments"], None, pipeline.vae.config.scaling_factor)
        noise = torch.randn(latents.shape, generator=source)
        timesteps = torch.randint(process.train_timesteps, (len(rows),), generator=source)
        noisy = process.add_noise(latents, noise, timesteps)
        text = embeddings[batch["prompt"]]
        prediction = pipeline.unet(noisy, timesteps, text, return_dict=False)[0]
        scores.append(sample_losses(prediction, latents).double())
    return torch.cat(scores)
