"""Phase 1: environments from the frozen model's per-sample denoising losses."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.diffusion.draws import generator, stratified_timesteps
from invdiff_pl.diffusion.noising import ForwardProcess, sample_losses, sample_posterior
from invdiff_pl.diffusion.pipeline import load_pipeline
from invdiff_pl.environments.partition import partition
from invdiff_pl.environments.quality import environment_report
from invdiff_pl.environments.scores import Losses, score, split_half_rank_correlation
from invdiff_pl.environments.table import LossTable
from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import write_json
from invdiff_pl.modules.common import data_module, output_folder
from invdiff_pl.tensors import write_tensors


class EnvironmentInference(pl.LightningModule):
    """Scores every training image and partitions the images of each prompt; run with ``predict``.

    All images meet the same noises at the same timesteps, so that differences between losses are
    differences between images; the reference's one random draw an image is mostly noise. Only
    losses are kept. Writes ``environments.safetensors`` (``assignments`` int64 [N], ``scores``
    float64 [N], ``losses`` and ``null_losses`` float32 [N, T, R]) and ``environments.json``.

    Args:
        backbone: pipeline folder, hub id or ``asset:NAME``.
        output: folder of the result.
        timesteps: T, evenly spaced over the noisiest part, up to the last timestep.
        noisiest_share: that part, of all timesteps: where layout and background are decided.
        noise_draws: R, common to all images.
        score: name of the score, see ``invdiff_pl.environments.scores``.
        groups: G, number of environments.
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
        noisiest_share: float = 0.5,
        noise_draws: int = 2,
        score: str = "refined_contrast",
        groups: int = 2,
        objective: str = "between",
        minimum_share: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.output = output
        self.score = score
        self.groups = groups
        self.objective = objective
        self.minimum_share = minimum_share
        self.seed = seed
        pipeline = load_pipeline(backbone)
        self.unet = pipeline.unet
        self.scaling_factor = float(pipeline.vae.config.scaling_factor)
        self.process = ForwardProcess(pipeline.scheduler.config)
        self.grid = stratified_timesteps(timesteps, self.process.train_timesteps, noisiest_share)
        self.noise_draws = noise_draws

    def setup(self, stage: str) -> None:
        """Fetch the prompt embeddings and the losses that an interrupted run left."""
        data = data_module(self)
        self.register_buffer("embeddings", data.prompt_embeddings(), persistent=False)
        self.count = len(data.index.rows("train"))
        folder = output_folder(self.output) / "losses"
        self.table = LossTable(folder, (len(self.grid), self.noise_draws))
        self.present = self.table.read(self.count)[1]

    def predict_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """Losses of a batch at every (timestep, noise), into the table."""
        if self.present[batch["row"].cpu()].all():
            return
        latents = sample_posterior(batch["moments"], None, self.scaling_factor)
        own = self.embeddings[batch["prompt"]]
        null = self.embeddings[-1:].expand_as(own)
        losses = latents.new_empty((len(latents), 2, len(self.grid), self.noise_draws))
        for column, timestep in enumerate(self.grid.tolist()):
            timesteps = torch.full((len(latents),), timestep, device=self.device)
            for draw in range(self.noise_draws):
                noise = self._noise(column, draw, latents)
                noisy = self.process.add_noise(latents, noise, timesteps)
                target = self.process.target(latents, noise, timesteps)
                for row, embeddings in enumerate((own, null)):
                    prediction = self.unet(noisy, timesteps, embeddings, return_dict=False)[0]
                    losses[:, row, column, draw] = sample_losses(prediction, target)
        self.table.append(batch["row"], losses)

    def _noise(self, column: int, draw: int, latents: Tensor) -> Tensor:
        source = generator(self.seed, "common noise", column, draw)
        return torch.randn(latents.shape[1:], generator=source).to(latents).expand_as(latents)

    def on_predict_end(self) -> None:
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
        losses = Losses(*table.unbind(1))
        prompts, attributes = data.labels("train")
        scores = score(losses, prompts, self.score)
        result = partition(
            scores, prompts, self.groups, self.minimum_share, objective=self.objective
        )
        folder = output_folder(self.output)
        tensors = {
            "assignments": result.assignments,
            "scores": scores,
            "losses": losses.own,
            "null_losses": losses.null,
        }
        write_tensors(folder / "environments.safetensors", tensors)
        quality = environment_report(scores, result.assignments, prompts, attributes)
        agreement = split_half_rank_correlation(losses, prompts, self.score)
        report: dict[str, Any] = {
            "images": self.count,
            "groups": self.groups,
            "score": self.score,
            "objective": {"name": self.objective, "value": result.objective},
            "timesteps": self.grid.tolist(),
            "noise_draws": self.noise_draws,
            "split_half_rank_correlation": agreement,
            "prompts": list(data.prompts),
            "quality": quality,
        }
        write_json(folder / "environments.json", report)
        print(summary(report))


def summary(report: dict[str, Any]) -> str:
    """What the inference found, for the terminal."""
    lines = []
    for prompt, entry in zip(report["prompts"], report["quality"]["per_prompt"], strict=True):
        sizes = " + ".join(map(str, entry["sizes"]))
        found = "" if entry.get("auc") is None else f", AUC {entry['auc']:.4f}"
        lines.append(f"{prompt}: {sizes} images{found}")
    if report["quality"].get("auc") is not None:
        lines.append(f"conflict-image AUC over all prompts: {report['quality']['auc']:.4f}")
    return "\n".join(lines)
