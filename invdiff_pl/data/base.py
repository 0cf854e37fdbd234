"""The DataModule that all data sets derive from: cached latents, prompts, balanced batches."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from invdiff_pl.backbones.assets import backbone_digest
from invdiff_pl.backbones.check import text_parts
from invdiff_pl.backbones.denoiser import in_precision
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import (
    load_autoencoder,
    load_pipeline,
    tokens_cut,
)
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.backbones.quantized import dtype_of
from invdiff_pl.data.batches import (
    ShuffledBatches,
)
from invdiff_pl.data.cache import (
    ResidentTensor,
    RowSource,
    ShardedTensor,
    build_shards,
    is_complete,
)
from invdiff_pl.data.datasets import (
    ImageDataset,
    PromptDataset,
)
from invdiff_pl.data.environments import Environments, candidate_numbers, read_environments
from invdiff_pl.data.images import read_images
from invdiff_pl.data.index import content_digest
from invdiff_pl.data.indexed import IndexedDataModule, Split
from invdiff_pl.data.latents import encode_images
from invdiff_pl.data.placement import LatentDevice, place_for
from invdiff_pl.data.training import Labels, TakesLabels
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import DAY, digest_json, remove_leftovers
from invdiff_pl.utils.resources import require_room
from invdiff_pl.utils.tensors import read_tensors, write_tensors

Content = Literal["latents", "images", "labelled_images", "prompts"]


class BiasedDataModule(IndexedDataModule):
    """DataModule of a data set whose prompts go along with an unlabelled attribute.

    Latents (both flips) and prompt embeddings are computed once by the backbone's VAE and text
    encoder, kept in ``cache_dir`` under a key of everything they depend on, and read from there
    afterwards.

    Args:
        backbone: pipeline folder, hub id or ``asset:NAME``, whose VAE and text encoder are used.
        resolution: side of the images in pixels.
        content: what batches hold: ``latents`` of the train split; ``images`` of the train split;
            ``labelled_images``, for the classifier that scores samples: training batches come
            from the val split, validation batches from the test split, with attributes; or
            ``prompts``, to be sampled.
        samples_per_prompt: number of samples per prompt.
        environments: folder of the environment stage's result. If given, training batches are
            made as ``batches`` says.
        soft_environments: whether images belong to environments by soft memberships.
        candidate: number of the candidate that is trained on, or several as ``"0,1"``, which are
            crossed; the first that is called a bias if not given.
        latent_device: where latents are held in training: ``disk`` reads each batch's rows from the
            shards; ``memory`` and ``device`` read all of them once; ``auto`` takes the device if
            they fill at most a quarter of its free memory, else the host's memory on the same
            terms, else the disk.
        embedding_dtype: dtype in which prompt embeddings are cached: ``float32`` or ``float16``.
            Latents are always cached in float16.
        frozen_weights: how the text encoders' weights are held, see
            :func:`~invdiff_pl.backbones.pipeline.load_pipeline`; the VAE's are float32.
        settings: as for :class:`~invdiff_pl.data.indexed.IndexedDataModule`.
    """

    def __init__(
        self,
        *,
        backbone: str,
        resolution: int,
        content: Content = "latents",
        samples_per_prompt: int = 256,
        environments: str | None = None,
        soft_environments: bool = False,
        candidate: int | str | None = None,
        latent_device: LatentDevice = "disk",
        embedding_dtype: Literal["float32", "float16"] = "float32",
        frozen_weights: str = "float32",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.backbone = backbone
        self.resolution = resolution
        self.content = content
        self.samples_per_prompt = samples_per_prompt
        self.environments = None if environments is None else Path(environments)
        self.soft_environments = soft_environments
        if candidate is not None:
            candidate_numbers(candidate)
        self.candidate = candidate
        self.latent_device = latent_device
        self.embedding_dtype: torch.dtype = getattr(torch, embedding_dtype)
        self.frozen_weights = frozen_weights
        self._contents: dict[Split, str] = {}
        self._inferred: Environments | None = None
        self._moments: RowSource | None = None

    @property
    def has_environments(self) -> bool:
        """Whether the environments stage's folder is given."""
        return self.environments is not None

    def inferred(self) -> Environments:
        """Return the environments of the train split, read once.

        Raises:
            InvDiffError: if none are given, or they do not match the data.
        """
        if self.environments is None:
            raise InvDiffError(
                "`environments` is not given: expected the environment stage's folder.",
                "environments",
            )
        if self._inferred is None:
            count = len(self.index.rows("train"))
            self._inferred = read_environments(
                self.environments, count, self.soft_environments, self.candidate
            )
        return self._inferred

    def setup(self, stage: str) -> None:
        """Give the module what it needs beside the batches."""
        if self.content in ("latents", "prompts"):
            super().setup(stage)
            return
        module = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, TakesLabels):
            module.use_labels(self._labels())

    def _labels(self) -> Labels:
        """Return the names and counts of what training batches hold beside images."""
        if self.content == "images":
            return Labels(self.prompts)
        names = self.prompts, tuple(self.attribute_names)
        if self.attributes() is None:
            return Labels(*names, missing=self.why_not_scored)
        prompts, attributes = self.labels("val")
        assert attributes is not None
        rows, columns = len(names[0]), len(names[1])
        counts = torch.bincount(prompts * columns + attributes, minlength=rows * columns)
        return Labels(*names, counts.reshape(rows, columns))

    def prepare_data(self) -> None:
        """Compute what the caches lack; runs in one process per node."""
        if self.content == "labelled_images" and self.attributes() is None:
            return  # nothing can be scored, so no classifier is trained
        remove_leftovers(self.cache_dir, older_than=DAY)
        if self.content in ("images", "labelled_images"):
            splits: tuple[Split, ...] = ("train",) if self.content == "images" else ("val", "test")
            for split in splits:
                self.images(split)
            return
        self.conditions()
        if self.content != "latents" or is_complete(folder := self._folder("latents", "train")):
            return
        paths = self.index.paths(self.index.rows("train"))
        encode_images(load_autoencoder(self.backbone), paths, self.resolution, folder)

    def conditions(self) -> Conditions:
        """Return the denoiser's inputs for every prompt and, last, the empty one, in float32."""
        file = self._prompts_file()
        if file.exists():
            try:
                cached = read_tensors(file, "it is computed anew", prompt_embeds=3)
            except InvDiffError as error:
                print(f"warning: {error}")
            else:
                if len(cached["prompt_embeds"]) == len(self.prompts) + 1:
                    return Conditions(in_precision(cached, torch.float32), self.prompts)
        pipeline = load_pipeline(self.backbone, self.frozen_weights, with_denoiser=False)
        for prompt, cut in tokens_cut(pipeline, self.prompts).items():
            print(f"warning: the text encoder does not see the last {cut} tokens of {prompt!r}")
        rows = frozen_denoiser(pipeline, self.resolution).condition([*self.prompts, ""])
        stored = in_precision(rows, self.embedding_dtype)
        write_tensors(file, stored)
        return Conditions(in_precision(stored, torch.float32), self.prompts)

    def images(self, split: Split) -> ShardedTensor:
        """Return the images of a split at ``resolution``, uint8 ``[N, 3, H, W]``, cached."""
        folder = self._folder("images", split)
        if not is_complete(folder):
            paths = self.index.paths(self.index.rows(split))
            size = len(paths) * 3 * self.resolution**2
            require_room(folder, size, f"{len(paths)} decoded {split} images")
            build_shards(
                folder,
                len(paths),
                lambda rows: read_images([paths[row] for row in rows], self.resolution),
                f"reading {split} images",
            )
        return ShardedTensor(folder)

    def content_key(self, split: Split) -> str:
        """Return the digest of a split's images as :meth:`images` returns them."""
        return self._folder("images", split).name

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training batches, from the current step on."""
        if self.content == "labelled_images":
            return self._image_loader("val", labelled=True, shuffled=True)
        if self.content == "images":
            return self._image_loader("train", labelled=False, shuffled=True)
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the test split's labelled images if ``content`` asks for labels, else nothing."""
        if self.content != "labelled_images" or self.attributes() is None:
            return []
        return self._image_loader("test", labelled=True, shuffled=False)

    def test_dataloader(self) -> DataLoader:
        """Return the same loader as :meth:`predict_dataloader`."""
        return self.predict_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Return every latent of the train split, or every sample to draw, over all ranks."""
        if self.content == "prompts":
            count = len(self.prompts) * self.samples_per_prompt
            return self._loader(PromptDataset(self.samples_per_prompt), self._every_row(count))
        return super().predict_dataloader()

    def moments(self) -> RowSource:
        """Return the train split's moments, float16 ``[N, 2, 2C, h, w]``, on ``latent_device``."""
        if self._moments is None:
            shards = ShardedTensor(self._folder("latents", "train"))
            device, processes = torch.device("cpu"), 1
            if self.trainer is not None:
                device = self.trainer.strategy.root_device
                processes = max(1, self.trainer.num_devices)
            place = place_for(shards.nbytes, self.latent_device, device, processes)
            self._moments = shards if place is None else ResidentTensor.read(shards, place)
        return self._moments

    def _image_loader(self, split: Split, *, labelled: bool, shuffled: bool) -> DataLoader:
        prompts, attributes = self.labels(split) if labelled else (self._prompts(split), None)
        if labelled and attributes is None:
            raise InvDiffError(f"{self.why_not_scored}.")
        sampler = (
            ShuffledBatches(len(prompts), self._plan())
            if shuffled
            else self._every_row(len(prompts))
        )
        return self._loader(ImageDataset(self.images(split), prompts, attributes), sampler)

    def _folder(self, kind: Literal["latents", "images"], split: Split) -> Path:
        if split not in self._contents:
            files = [self.index.files[row] for row in self.index.rows(split).tolist()]
            self._contents[split] = content_digest(
                self.root, files, self.cache_dir / "content", follow_links=self.follow_links
            )
        key: dict[str, Any] = {
            "content": self._contents[split],
            "resolution": self.resolution,
        }
        if kind == "latents":
            key["vae"] = backbone_digest(self.backbone, "vae")
        return self.cache_dir / kind / digest_json(key)

    def _prompts_file(self) -> Path:
        key: dict[str, Any] = {
            "prompts": self.prompts,
            **{part: backbone_digest(self.backbone, part) for part in text_parts(self.backbone)},
        }
        if self.embedding_dtype != torch.float32:
            key["dtype"] = str(self.embedding_dtype)
        if (encoders := dtype_of(self.frozen_weights)) != torch.float32:
            key["encoders"] = str(encoders)
        return self.cache_dir / "prompts" / f"{digest_json(key)}.safetensors"
