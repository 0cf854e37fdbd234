"""The DataModule that every data set shares: cached latents, prompts and balanced batches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from invdiff_pl.backbones.check import text_parts
from invdiff_pl.backbones.denoiser import in_precision
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import (
    backbone_digest,
    load_pipeline,
    tokens_cut,
)
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.batches import (
    ShuffledBatches,
)
from invdiff_pl.data.broken import describe_broken, readable_rows
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
from invdiff_pl.data.index import ImageIndex, content_digest
from invdiff_pl.data.latents import encode_images
from invdiff_pl.data.placement import LatentDevice, place_for
from invdiff_pl.data.scarce import without_rare_prompts
from invdiff_pl.data.training import Batches, Labels, LatentDataModule, TakesLabels
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import DAY, digest_json, remove_leftovers
from invdiff_pl.utils.resources import require_room
from invdiff_pl.utils.tensors import read_tensors, write_tensors

Split = Literal["train", "val", "test"]

Content = Literal["latents", "images", "labelled_images", "prompts"]


class BiasedDataModule(LatentDataModule, ABC):
    """A data set whose prompts go along with an attribute that nobody has labelled.

    Latents (both flips) and prompt embeddings are computed once by the backbone's VAE and text
    encoder, kept in ``cache_dir`` under a key of everything they depend on, and read through
    memory maps afterwards.

    Args:
        root: folder of the data set.
        backbone: pipeline folder, hub id or ``asset:NAME``, whose VAE and text encoder are used.
        resolution: side of the images in pixels.
        batch_size: global, over all ranks and accumulated micro-batches.
        cache_dir: where caches live; they are shared by all runs.
        content: what batches hold: ``latents`` of the train split; ``images`` of the train split;
            ``labelled_images``, for the classifier that scores samples: training batches come
            from the val split, validation batches from the test split, with attributes; or
            ``prompts``, to be sampled.
        samples_per_prompt: how often each prompt is sampled.
        environments: folder of the environment stage's result. If given, training batches are
            made as ``batches`` says.
        soft_environments: whether images belong to environments by soft memberships.
        candidate: number of the candidate that is trained on, or several as ``"0,1"``, which are
            crossed; the first that is called a bias if not given.
        batches: ``paired`` (balanced over (prompt, environment), with paired draws), ``balanced``
            (the same, each image with a draw of its own) or ``shuffled``.
        held_out: share of each environment that training never sees, for held-out risks.
        seed: of the order of images and of the flips.
        workers: processes that load batches; 0 reads in the training process.
        latent_device: where latents are held while they are trained on: ``disk`` reads each batch's
            rows from the shards; ``memory`` and ``device`` read all of them once; ``auto`` takes
            the device where they fill at most a quarter of what is free of its memory, else the
            host's memory on the same terms, else the disk.
        embedding_dtype: in which prompt embeddings are cached: ``float32`` or ``float16``. Latents
            are cached in float16 always.
        broken: what becomes of an image that cannot be read: ``fail`` names it and stops;
            ``skip`` leaves it out, named and counted, in all stages alike. It is never replaced.
        links: what becomes of an image that is a link to something outside ``root``: ``refuse``
            reads nothing there; ``follow`` does, as in a snapshot of the Hugging Face hub's cache.
        min_images_per_prompt: a prompt with fewer images in the train split is left out, named, in
            all stages alike; where that would be most images, nothing is run.
    """

    def __init__(
        self,
        *,
        root: str,
        backbone: str,
        resolution: int,
        batch_size: int = 64,
        cache_dir: str = ".cache/invdiff",
        content: Content = "latents",
        samples_per_prompt: int = 256,
        environments: str | None = None,
        soft_environments: bool = False,
        candidate: int | str | None = None,
        batches: Batches = "paired",
        held_out: float = 0.1,
        seed: int = 0,
        workers: int = 0,
        latent_device: LatentDevice = "disk",
        embedding_dtype: Literal["float32", "float16"] = "float32",
        broken: Literal["fail", "skip"] = "fail",
        links: Literal["refuse", "follow"] = "refuse",
        min_images_per_prompt: int = 1,
    ) -> None:
        super().__init__(
            batch_size=batch_size, batches=batches, held_out=held_out, seed=seed, workers=workers
        )
        self.root = Path(root)
        self.backbone = backbone
        self.resolution = resolution
        self.cache_dir = Path(cache_dir)
        self.content = content
        self.samples_per_prompt = samples_per_prompt
        self.environments = None if environments is None else Path(environments)
        self.soft_environments = soft_environments
        if candidate is not None:
            candidate_numbers(candidate)
        self.candidate = candidate
        self.latent_device = latent_device
        self.embedding_dtype: torch.dtype = getattr(torch, embedding_dtype)
        self.broken = broken
        self.links = links
        if min_images_per_prompt < 1:
            raise InvDiffError(
                f"min_images_per_prompt={min_images_per_prompt}: expected 1 or more.",
                "min_images_per_prompt",
            )
        self.min_images_per_prompt = min_images_per_prompt
        self._index: ImageIndex | None = None
        self._kept: Tensor | None = None
        self._contents: dict[Split, str] = {}
        self._inferred: Environments | None = None
        self._moments: RowSource | None = None

    attribute = "attribute"  # what figures of it are called

    @property
    @abstractmethod
    def attribute_names(self) -> Sequence[str]:
        """The attribute's classes in the order of their codes."""

    @abstractmethod
    def read_index(self) -> ImageIndex:
        """Read files, prompts and splits."""

    @abstractmethod
    def read_attributes(self) -> Tensor | None:
        """Attribute class of each image, int64 ``[N]``, for scoring only.

        ``None`` where the data set has no such labels.
        """

    @property
    def index(self) -> ImageIndex:
        """The index, read once."""
        if self._index is None:
            if not self.root.is_dir():
                raise InvDiffError(
                    f"data folder {self.root} does not exist: give the data set's folder with "
                    "root= (or, of make, DATA=).",
                    "root",
                )
            self._index = self._usable(self.read_index())
        return self._index

    @property
    def told(self) -> list[str]:
        """What was read from where and what was left out, for people; nothing by default."""
        return []

    @property
    def follow_links(self) -> bool:
        """Whether images are read that lie outside the root."""
        return self.links == "follow"

    def _usable(self, index: ImageIndex) -> ImageIndex:
        """The index without broken images, if they are to be left out, and without rare prompts."""
        kept = torch.arange(len(index))
        if self.broken == "skip":
            kept, listed = readable_rows(
                index, self.cache_dir / "broken", follow_links=self.follow_links
            )
            if listed is not None:
                index = index.subset(kept)
                rank_zero_only(print)(describe_broken(listed))
        index, rows, told = without_rare_prompts(index, self.min_images_per_prompt)
        if told is not None:
            rank_zero_only(print)(told)
        self._kept = kept[rows]
        return index

    def attributes(self) -> Tensor | None:
        """Attribute class of each image of :attr:`index`, int64 ``[N]``, for scoring only."""
        attributes = self.read_attributes()
        if attributes is None:
            return None
        _ = self.index  # finds out which images are left out
        return attributes if self._kept is None else attributes[self._kept]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The distinct prompts; batches hold numbers into them."""
        return self.index.prompts

    def train_prompts(self) -> Tensor:
        """The prompt of each image of the train split, int64 ``[N]``."""
        return self._prompts("train")

    @property
    def has_environments(self) -> bool:
        """Whether the environments stage's folder is given."""
        return self.environments is not None

    def inferred(self) -> Environments:
        """The environments of the train split, read once.

        Raises:
            InvDiffError: if none are given, or they do not fit the data.
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

    @property
    def why_not_scored(self) -> str:
        """What to tell where figures are missing because there are no attribute labels."""
        return f"{self.root} has no attribute labels to score samples with"

    def setup(self, stage: str) -> None:
        """Hand the module what it needs beside the batches."""
        if self.content in ("latents", "prompts"):
            super().setup(stage)
            return
        module = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, TakesLabels):
            module.use_labels(self._labels())

    def _labels(self) -> Labels:
        """What training batches of images hold beside them."""
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
        """Compute what the caches lack. Runs on one process a node."""
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
        vae = load_pipeline(self.backbone, with_denoiser=False).vae
        encode_images(vae, paths, self.resolution, folder)

    def conditions(self) -> Conditions:
        """What every prompt and, last, the empty one become for the denoiser, in float32."""
        file = self._prompts_file()
        if file.exists():
            try:
                cached = read_tensors(file, "it is computed anew", prompt_embeds=3)
            except InvDiffError as error:
                print(f"warning: {error}")
            else:
                if len(cached["prompt_embeds"]) == len(self.prompts) + 1:
                    return Conditions(in_precision(cached, torch.float32), self.prompts)
        pipeline = load_pipeline(self.backbone, with_denoiser=False)
        for prompt, cut in tokens_cut(pipeline, self.prompts).items():
            print(f"warning: the text encoder does not see the last {cut} tokens of {prompt!r}")
        rows = frozen_denoiser(pipeline, self.resolution).condition([*self.prompts, ""])
        stored = in_precision(rows, self.embedding_dtype)
        write_tensors(file, stored)
        return Conditions(in_precision(stored, torch.float32), self.prompts)

    def images(self, split: Split) -> ShardedTensor:
        """The images of a split at ``resolution``, uint8 ``[N, 3, H, W]``, cached."""
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
        """Digest of a split's images as :meth:`images` gives them."""
        return self._folder("images", split).name

    def labels(self, split: Split) -> tuple[Tensor, Tensor | None]:
        """Prompt and attribute of each image of a split, for scoring only."""
        rows = self.index.rows(split)
        attributes = self.attributes()
        return self.index.prompt_ids[rows], None if attributes is None else attributes[rows]

    def train_dataloader(self) -> DataLoader:
        """Batches from the step that training stands at."""
        if self.content == "labelled_images":
            return self._image_loader("val", labelled=True, shuffled=True)
        if self.content == "images":
            return self._image_loader("train", labelled=False, shuffled=True)
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Labelled images of the test split where ``content`` asks for labels, else nothing."""
        if self.content != "labelled_images" or self.attributes() is None:
            return []
        return self._image_loader("test", labelled=True, shuffled=False)

    def test_dataloader(self) -> DataLoader:
        """What :meth:`predict_dataloader` gives."""
        return self.predict_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Every latent of the train split once, or every sample to draw, shared by the ranks."""
        if self.content == "prompts":
            count = len(self.prompts) * self.samples_per_prompt
            return self._loader(PromptDataset(self.samples_per_prompt), self._every_row(count))
        return super().predict_dataloader()

    def moments(self) -> RowSource:
        """The train split's latents, float16 ``[N, 2, 2C, h, w]``, where ``latent_device`` says."""
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

    def _prompts(self, split: Split) -> Tensor:
        return self.index.prompt_ids[self.index.rows(split)]

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
        return self.cache_dir / "prompts" / f"{digest_json(key)}.safetensors"
