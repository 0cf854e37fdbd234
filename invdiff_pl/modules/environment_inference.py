"""Phase 1: environments from the frozen model's per-sample denoising losses."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.diffusion.draws import generator, on_device, stratified_timesteps
from invdiff_pl.diffusion.noising import ForwardProcess, predict, sample_losses, sample_posterior
from invdiff_pl.diffusion.pipeline import load_pipeline
from invdiff_pl.environments.assignment import assign
from invdiff_pl.environments.evidence import weigh
from invdiff_pl.environments.partition import partition
from invdiff_pl.environments.quality import environment_report
from invdiff_pl.environments.scores import (
    Losses,
    attribute_scores,
    by_group,
    contrast_table,
    score,
    split_half_rank_correlation,
    standardise,
    timestep_weights,
)
from invdiff_pl.environments.soft import choose_groups, mixture_memberships
from invdiff_pl.environments.table import LossTable
from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import write_json
from invdiff_pl.modules.common import data_module, hold_frozen, output_folder
from invdiff_pl.tensors import write_tensors

# The largest number of environments that is tried where it is to be chosen.
MOST_GROUPS = 4


class EnvironmentInference(pl.LightningModule):
    """Scores every training image and partitions the images of each prompt; run with ``predict``.

    All images meet the same noises at the same timesteps, so that differences between losses are
    differences between images; the reference's one random draw an image is mostly noise. Only
    losses are kept. Writes ``environments.safetensors`` (``assignments`` int64 [N], ``scores``
    float64 [N], ``losses`` float32 [N, T, own draws] and ``null_losses`` float32 [N, T, R]) and
    ``environments.json``.

    Args:
        backbone: pipeline folder, hub id or ``asset:NAME``.
        output: folder of the result.
        timesteps: T, the middles of as many equal parts of a range of timesteps.
        earliest: where the range begins, as a part of all timesteps: with much noise, where layout
            and background are decided.
        latest: where it ends: short of no signal at all, where all noises tell the same.
        noise_draws: R, common to all images, under the empty prompt.
        own_draws: how many of them are met under the image's own prompt, too.
        score: name of the score, see ``invdiff_pl.environments.scores``.
        groups: G, number of environments; ``None`` chooses from 2 to 4 by how well mixtures of as
            many groups tell the scores.
        partition: how environments are made of scores, see ``invdiff_pl.environments.assignment``.
        objective: spread that the partition maximises, see ``invdiff_pl.environments.partition``.
        minimum_share: least share of a prompt's images in an environment.
        seed: of the noises.
    """

    embeddings: Tensor

    def __init__(
        self,
        backbone: str,
        output: str,
        timesteps: int = 4,
        earliest: float = 0.72,
        latest: float = 0.96,
        noise_draws: int = 8,
        own_draws: int = 1,
        score: str = "prompt_pursuit",
        groups: int | None = 2,
        partition: str = "exact",
        objective: str = "between",
        minimum_share: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.output = output
        self.score = score
        self.groups = groups
        self.partition = partition
        self.objective = objective
        self.minimum_share = minimum_share
        self.seed = seed
        pipeline = load_pipeline(backbone)
        self.unet = pipeline.unet
        self.scaling_factor = float(pipeline.vae.config.scaling_factor)
        self.process = ForwardProcess(pipeline.scheduler.config)
        self.grid = stratified_timesteps(timesteps, self.process.train_timesteps, earliest, latest)
        self.noise_draws = noise_draws
        if not 1 <= own_draws <= noise_draws:
            raise InvDiffError(
                f"--model.own_draws={own_draws}: expected from 1 to --model.noise_draws="
                f"{noise_draws}."
            )
        self.own_draws = own_draws

    def setup(self, stage: str) -> None:
        """Fetch the prompt embeddings and the losses that an interrupted run left."""
        data = data_module(self)
        self.register_buffer("embeddings", data.prompt_embeddings(), persistent=False)
        hold_frozen(self)
        self.count = len(data.index.rows("train"))
        folder = output_folder(self.output) / "losses"
        self.table = LossTable(folder, (len(self.grid), self.noise_draws))
        self.present = self.table.read(self.count)[1]

    def predict_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """Losses of a batch at every (timestep, noise), into the table."""
        if self.present[batch["row"]].all():
            return
        latents = sample_posterior(batch["moments"], None, self.scaling_factor)
        own = self.embeddings[batch["prompt"]]
        null = self.embeddings[-1:].expand_as(own)
        losses = latents.new_zeros((len(latents), 2, len(self.grid), self.noise_draws))
        for column, timestep in enumerate(self.grid.tolist()):
            timesteps = torch.full((len(latents),), timestep, device=self.device)
            for draw in range(self.noise_draws):
                noise = self._noise(column, draw, latents)
                noisy = self.process.add_noise(latents, noise, timesteps)
                target = self.process.target(latents, noise, timesteps)
                given = {0: own, 1: null} if draw < self.own_draws else {1: null}
                for row, embeddings in given.items():
                    prediction = predict(self.unet, noisy, timesteps, embeddings)
                    losses[:, row, column, draw] = sample_losses(prediction, target)
        self.table.append(batch["row"], losses)

    def _noise(self, column: int, draw: int, latents: Tensor) -> Tensor:
        source = generator(self.seed, "common noise", column, draw)
        noise = torch.randn(latents.shape[1:], generator=source)
        return on_device(noise, latents.device).expand_as(latents)

    def on_predict_epoch_end(self) -> None:
        """Partition once all ranks have written their losses."""
        self.table.flush()
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            self._infer()

    def _infer(self) -> None:
        data = data_module(self)
        table, present = self.table.read(self.count)
        if not present.all():
            raise InvDiffError(
                f"{self.table.folder} lacks the losses of {int((~present).sum())} of {self.count} "
                "images: run the same command again, which scores them."
            )
        own, null = table.unbind(1)
        losses = Losses(own[..., : self.own_draws], null)
        prompts, attributes = data.labels("train")
        found, refined = attribute_scores(losses, prompts)
        evidence = weigh(found, refined, prompts)
        pursued = self.score == "prompt_pursuit"
        scores = by_group(refined, prompts) if pursued else score(losses, prompts, self.score)
        groups, criteria = self._groups(scores, prompts)
        result = assign(
            scores,
            prompts,
            groups,
            method=self.partition,
            minimum_share=self.minimum_share,
            objective=self.objective,
            table=standardise(losses.null, prompts).flatten(1),
            seed=self.seed,
        )
        soft = mixture_memberships(scores, prompts, result.assignments)
        folder = output_folder(self.output)
        tensors = {
            "assignments": result.assignments,
            "memberships": soft if self.partition == "exact" else result.memberships,
            "scores": scores,
            "losses": losses.own,
            "null_losses": losses.null,
        }
        write_tensors(folder / "environments.safetensors", tensors)
        weights = timestep_weights(contrast_table(losses, prompts), prompts)
        report: dict[str, Any] = {
            "images": self.count,
            "groups": groups,
            "groups_criteria": criteria,
            "bias_found": evidence.bias_found,
            "evidence": evidence.to_json(),
            "score": self.score,
            "partition": self.partition,
            "objective": {"name": self.objective, "value": result.objective},
            "timesteps": self.grid.tolist(),
            "timestep_weights": weights.tolist(),
            "noise_draws": self.noise_draws,
            "split_half_rank_correlation": split_half_rank_correlation(losses, prompts, self.score),
            "prompts": list(data.prompts),
            "quality": environment_report(
                scores,
                result.assignments,
                prompts,
                attributes,
                losses.own.mean((1, 2)),
                memberships=soft,
            ),
        }
        write_json(folder / "environments.json", report)
        print(summary(report))

    def _groups(self, scores: Tensor, prompts: Tensor) -> tuple[int, dict[int, float] | None]:
        """The number of environments and, if it is chosen here, the criterion of each number."""
        if self.groups is not None:
            return self.groups, None
        partitions = {
            groups: partition(
                scores, prompts, groups, min(self.minimum_share, 1 / groups)
            ).assignments
            for groups in range(2, MOST_GROUPS + 1)
        }
        return choose_groups(scores, prompts, partitions)


def summary(report: dict[str, Any]) -> str:
    """What the inference found, for the terminal."""
    found, evidence = report["bias_found"], report["evidence"]
    verdict = {True: "bias found", False: "no bias found", None: "bias not tested"}[found]
    lines = [f"{verdict}: {evidence['reason']}"]
    for prompt, entry in zip(report["prompts"], report["quality"]["per_prompt"], strict=True):
        sizes = " + ".join(map(str, entry["sizes"]))
        sure = f", confidence {entry['confidence']:.2f}" if "confidence" in entry else ""
        auc = "" if entry.get("auc") is None else f", AUC {entry['auc']:.4f}"
        lines.append(f"{prompt}: {sizes} images{sure}{auc}")
    if report["quality"].get("auc") is not None:
        lines.append(f"conflict-image AUC over all prompts: {report['quality']['auc']:.4f}")
    return "\n".join(lines)
