"""Phase 1: environments from the frozen model's per-sample denoising losses."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator, on_device, stratified_timesteps
from invdiff_pl.backbones.noising import ForwardProcess, predict, sample_losses, sample_posterior
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.environments.inference import Settings, infer
from invdiff_pl.environments.quality import environment_report
from invdiff_pl.environments.scores import Losses, contrast_table, timestep_weights
from invdiff_pl.environments.table import LossTable
from invdiff_pl.modules.common import data_module, hold_frozen, output_folder
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import write_json
from invdiff_pl.utils.tensors import write_tensors

_PROMPTS_TOLD = 20


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
            many groups tell the scores. With 4 or ``None``, ``prompt_pursuit`` looks for a second
            attribute within the first one's values; where the evidence for it stands the same test,
            the environments are the four pairs of both attributes' groups.
        partition: how environments are made of scores, see ``invdiff_pl.environments.assignment``.
        objective: spread that the partition maximises, see ``invdiff_pl.environments.partition``.
        minimum_share: least share of a prompt's images in an environment.
        seed: of the noises.
    """

    conditions: Conditions

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
        self.require_settings(self.hparams)
        self.settings = Settings(score, groups, partition, objective, minimum_share, seed)
        self.seed = seed
        pipeline = load_pipeline(backbone)
        self.unet = pipeline.unet
        self.scaling_factor = float(pipeline.vae.config.scaling_factor)
        self.process = ForwardProcess(pipeline.scheduler.config)
        self.grid = stratified_timesteps(timesteps, self.process.train_timesteps, earliest, latest)
        self.noise_draws = noise_draws
        self.own_draws = own_draws

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Refuse settings before a network is loaded.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first that is wrong.
        """
        Settings(**{field.name: settings[field.name] for field in fields(Settings)})
        own_draws, noise_draws = settings["own_draws"], settings["noise_draws"]
        if not 1 <= own_draws <= noise_draws:
            raise InvDiffError(
                f"own_draws={own_draws}: expected from 1 to noise_draws={noise_draws}.",
                "own_draws",
                "noise_draws",
            )

    def use_prompts(self, conditions: Conditions) -> None:
        """Take what the prompts and, last, the empty one become."""
        self.conditions = conditions

    def setup(self, stage: str) -> None:
        """Fetch the losses that an interrupted run left."""
        data = data_module(self)
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
        own = self.conditions[batch["prompt"]]["prompt_embeds"]
        null = self.conditions.null["prompt_embeds"].expand_as(own)
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
        inferred = infer(losses, prompts, self.settings)
        result, evidence, second = inferred.result, inferred.evidence, inferred.second
        folder = output_folder(self.output)
        tensors = {
            "assignments": result.assignments,
            "memberships": inferred.soft
            if self.settings.partition == "exact"
            else result.memberships,
            "scores": inferred.scores,
            "losses": losses.own,
            "null_losses": losses.null,
        }
        write_tensors(folder / "environments.safetensors", tensors)
        weights = timestep_weights(contrast_table(losses, prompts), prompts)
        report: dict[str, Any] = {
            "images": self.count,
            "groups": inferred.groups,
            "groups_criteria": inferred.criteria,
            "bias_found": evidence.bias_found,
            "evidence": evidence.to_json(),
            "second_attribute": None if second is None else second.to_json(),
            "score": self.settings.score,
            "partition": self.settings.partition,
            "objective": {"name": self.settings.objective, "value": result.objective},
            "timesteps": self.grid.tolist(),
            "timestep_weights": weights.tolist(),
            "noise_draws": self.noise_draws,
            "split_half_rank_correlation": inferred.split_half,
            "prompts": list(data.prompts),
            "quality": environment_report(
                inferred.scores,
                result.assignments,
                prompts,
                attributes,
                losses.own.mean((1, 2)),
                memberships=None if evidence.bias_found is None else inferred.soft,
            ),
        }
        write_json(folder / "environments.json", report)
        print(summary(report))


def summary(report: dict[str, Any]) -> str:
    """What the inference found, for the terminal."""
    found, evidence = report["bias_found"], report["evidence"]
    verdict = {True: "bias found", False: "no bias found", None: "bias not tested"}[found]
    lines = [f"{verdict}: {evidence['reason']}"]
    if report["second_attribute"] is not None:
        lines.append(f"a second attribute beside it: {report['second_attribute']['reason']}")
    entries = list(zip(report["prompts"], report["quality"]["per_prompt"], strict=True))
    for prompt, entry in entries[:_PROMPTS_TOLD]:
        sizes = " + ".join(map(str, entry["sizes"]))
        sure = f", confidence {entry['confidence']:.2f}" if "confidence" in entry else ""
        auc = "" if entry.get("auc") is None else f", AUC {entry['auc']:.4f}"
        lines.append(f"{' '.join(prompt.split())}: {sizes} images{sure}{auc}")
    if len(entries) > _PROMPTS_TOLD:
        lines.append(f"… and {len(entries) - _PROMPTS_TOLD} more prompts")
    if report["quality"].get("auc") is not None:
        lines.append(f"conflict-image AUC over all prompts: {report['quality']['auc']:.4f}")
    return "\n".join(lines)
