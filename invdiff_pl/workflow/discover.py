"""Finding hidden attributes of images that are at hand, with a pipeline's own denoiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import pandas as pd
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.data.latents import encoded
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.environments.features import image_features
from invdiff_pl.environments.hidden_attribute import Candidate as HiddenAttribute
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings, find_hidden_attributes
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import write_json
from invdiff_pl.utils.labels import prompt_label
from invdiff_pl.utils.sheets import TILE, contact_sheet
from invdiff_pl.utils.tensors import write_tensors

_COLUMNS = 10
_HEADING = 60  # characters


@dataclass(frozen=True)
class Candidate:
    """A hidden attribute of prompted images, and what speaks for it.

    Attributes:
        attribute: what the inference found.
        images: N images of P prompts.
    """

    attribute: HiddenAttribute
    images: PromptedImages

    @property
    def memberships(self) -> Tensor:
        """Of each image in each group, float64 ``[N, G]``, rows with sum 1."""
        return self.attribute.memberships

    @property
    def conflict(self) -> Tensor:
        """High where an image goes against what is usual for its prompt, float64 ``[N]``."""
        return self.attribute.conflict

    @property
    def shares(self) -> Tensor:
        """Of the groups in each prompt, float64 ``[P, G]``, rows with sum 1."""
        return self.attribute.shares

    @property
    def evidence(self) -> float:
        """By which candidates are ranked, at least 0."""
        return self.attribute.evidence

    @property
    def verdict(self) -> str:
        """Whether it is a bias, as far as the images tell."""
        return self.attribute.verdict

    @property
    def reason(self) -> str:
        """For the verdict, in a sentence."""
        return self.attribute.reason

    def sheet(self, prompt: int | str) -> Image.Image:
        """The most typical images of each group of a prompt, a row a group.

        Args:
            prompt: its number or text.

        Raises:
            ValueError: if there is no such prompt.
        """
        prompts = self.images.prompts
        number = prompts.index(prompt) if prompt in prompts else prompt
        if not isinstance(number, int) or not 0 <= number < len(prompts):
            raise InvDiffError(
                f"prompt={prompt!r}: expected one of the {len(prompts)} prompts or its number."
            )
        rows: dict[str, list[Tensor]] = {}
        here = (self.images.prompt_ids == number).nonzero().squeeze(1)
        groups = self.memberships[here].argmax(1)
        for group in range(self.memberships.shape[1]):
            members = here[groups == group]
            typical = members[self.memberships[members, group].argsort(descending=True)]
            chosen = typical[:_COLUMNS].tolist()
            pixels = self.images.pixels(chosen, TILE) if chosen else ()
            rows[f"group {group}: {len(members)}"] = list(pixels)
        return contact_sheet(prompt_label(prompts[number], number, _HEADING), rows, _COLUMNS)

    def to_pandas(self) -> pd.DataFrame:
        """A row an image: its prompt, its likeliest group, that group's probability, conflict."""
        probability, group = self.memberships.max(1)
        texts = [self.images.prompts[number] for number in self.images.prompt_ids.tolist()]
        return pd.DataFrame(
            {
                "prompt": texts,
                "group": group.numpy(),
                "probability": probability.numpy(),
                "conflict": self.conflict.numpy(),
            }
        )

    def save(self, folder: str | Path, sheets: int = 12) -> Path:
        """Write memberships, a table, facts and contact sheets into a folder.

        Args:
            folder: created where it is missing.
            sheets: at most so many, of the prompts with most images.

        Returns:
            the folder.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            "assignments": self.memberships.argmax(1),
            "memberships": self.memberships,
            "scores": self.conflict,
        }
        write_tensors(target / "environments.safetensors", tensors)
        self.to_pandas().to_csv(target / "images.csv", index_label="image")
        facts = {
            "prompts": list(self.images.prompts),
            "groups": self.memberships.shape[1],
            "shares": self.shares.tolist(),
            "evidence": self.evidence,
            "verdict": self.verdict,
            "reason": self.reason,
        }
        write_json(target / "candidate.json", facts)
        counts = self.images.prompt_ids.bincount()
        for place, prompt in enumerate(counts.argsort(descending=True)[:sheets].tolist()):
            self.sheet(prompt).save(target / f"sheet-{place:02d}.png")
        return target

    def __repr__(self) -> str:
        return (
            f"Candidate({self.memberships.shape[1]} groups, evidence {self.evidence:.3g}, "
            f"{self.verdict}: {self.reason})"
        )


class Discovery(Sequence[Candidate]):
    """Hidden attributes of the same images, that of most evidence first.

    Args:
        candidates: best first.
        images: that they are attributes of.
    """

    def __init__(self, candidates: Sequence[Candidate], images: PromptedImages) -> None:
        self._candidates = tuple(candidates)
        self.images = images

    @overload
    def __getitem__(self, index: int) -> Candidate: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...

    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        return self._candidates[index]

    def __len__(self) -> int:
        return len(self._candidates)

    def to_pandas(self) -> pd.DataFrame:
        """A row a candidate and prompt: evidence, verdict, and the share of each group."""
        rows = [
            {
                "candidate": number,
                "evidence": candidate.evidence,
                "verdict": candidate.verdict,
                "prompt": prompt,
                **{f"share_{group}": share for group, share in enumerate(shares)},
            }
            for number, candidate in enumerate(self)
            for prompt, shares in zip(self.images.prompts, candidate.shares.tolist(), strict=True)
        ]
        return pd.DataFrame(rows)

    def save(self, folder: str | Path, most: int = 5) -> Path:
        """Write the first candidates, each into a folder of its own, and ``discovery.csv``.

        Returns:
            the folder.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for number, candidate in enumerate(self._candidates[:most]):
            candidate.save(target / f"candidate-{number}")
        self.to_pandas().to_csv(target / "discovery.csv", index=False)
        return target

    def __repr__(self) -> str:
        lines = [f"  {number}: {candidate!r}" for number, candidate in enumerate(self)]
        return "\n".join([f"Discovery of {len(self.images)} images:", *lines])


def discover(
    pipe: StableDiffusionPipeline,
    images: PromptedImages,
    *,
    embeddings: Tensor | None = None,
    resolution: int | None = None,
    settings: HiddenAttributeSettings | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Discovery:
    """Find attributes that go along with prompts, which nobody has labelled.

    One pass of the frozen denoiser an image gives features; a mixture tells which images of
    different prompts share something that the prompts do not name, and how uneven its shares are.

    Args:
        pipe: a loaded pipeline, on any device; it is left as it is.
        images: N images of P prompts.
        embeddings: features of one's own, ``[N, D]``, such as a CLIP model's; the denoiser is not
            asked then.
        resolution: side of the images in pixels; the pipeline's own if not given.
        settings: of the inference.
        batch_size: images at once; chosen by the resolution if not given.
        seed: of the noise that all images share, and of the search.
        progress: show a progress bar.

    Returns:
        candidates, best first; none where nothing was found.

    Raises:
        ValueError: if no prompt repeats, or embeddings are not of the images.

    Example:
        >>> import torch
        >>> import invdiff_pl as inv
        >>> from invdiff_pl.backbones.architecture import tiny_pipeline
        >>> from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings
        >>> prompts = ["a photo of a nurse", "a photo of a pilot"]
        >>> images = inv.PromptedImages(torch.rand(16, 3, 32, 32), prompts * 8)
        >>> few = HiddenAttributeSettings(components=4, starts=2, resamples=2)  # takes seconds
        >>> pipe = tiny_pipeline(prompts)
        >>> found = inv.discover(pipe, images, settings=few, progress=False)
        >>> found[0].verdict  # of noise; 16 images would not tell anyway
        'untestable'
        >>> found[0].memberships.shape, found[0].conflict.shape, found[0].shares.shape
        (torch.Size([16, 2]), torch.Size([16]), torch.Size([2, 2]))
        >>> list(found[0].to_pandas().columns)
        ['prompt', 'group', 'probability', 'conflict']
    """
    if len(images.prompts) == len(images):
        raise InvDiffError(
            f"images: each of the {len(images)} prompts occurs once, and images of one prompt are "
            "compared with each other; give them prompts that repeat, such as one text for all, or "
            'PromptedImages.from_folder(folder, prompts_from="words:nurse,doctor").'
        )
    if embeddings is None:
        features = _features(pipe, images, resolution, batch_size, seed, progress)
    elif embeddings.ndim != 2 or len(embeddings) != len(images):
        raise InvDiffError(
            f"embeddings: found shape {list(embeddings.shape)}; expected [{len(images)}, D]."
        )
    else:
        features = embeddings
    found = find_hidden_attributes(features, images.prompt_ids, settings)
    return Discovery([Candidate(attribute, images) for attribute in found], images)


def _features(
    pipe: StableDiffusionPipeline,
    images: PromptedImages,
    resolution: int | None,
    batch_size: int | None,
    seed: int,
    progress: bool,
) -> Tensor:
    """Features of every image, ``[N, D]``, as they are encoded."""
    scaling = pipe.vae.config.scaling_factor
    told = "features of images" if progress else None
    batches = encoded(
        pipe.vae, images, frozen_denoiser(pipe, resolution).resolution, batch_size, told
    )
    means = (moments[:, 0].chunk(2, dim=1)[0] * scaling for moments in batches)
    return image_features(pipe, means, seed=seed)
