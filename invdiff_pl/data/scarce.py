"""Prompts with too few images to compare: which are left out, and what to do about them."""

import torch

from invdiff_pl.data.index import ImageIndex
from invdiff_pl.utils.errors import InvDiffError

_NAMED = 5
_MENDS = ("min_images_per_prompt", "prompt", "prompt_map", "prompts_from")
# Average number of images per prompt from which on captions count as prompts that repeat.
_REPEATED = 3
ONE_PROMPT = (
    "there is only one prompt: a bias shows in how prompts differ, so none is tested for, and "
    "nothing is trained unless train_without_bias=true"
)


def without_rare_prompts(
    index: ImageIndex, least: int
) -> tuple[ImageIndex, torch.Tensor, str | None]:
    """Leave out the prompts that have too few images in the train split.

    Args:
        index: index of the usable images.
        least: smallest number of images per prompt.

    Returns:
        the index of the rest; its rows in ``index``, int64; and a message on which prompts are left
        out, if any are.

    Raises:
        InvDiffError: if fewer than half of the images would be left to train on.
    """
    if least == 1:
        index.require_training_images()
    prompts = index.prompt_ids[index.rows("train")]
    counts = prompts.bincount(minlength=len(index.prompts))
    kept = counts >= least
    if bool(kept.all()):
        return index, torch.arange(len(index)), None
    left = int(counts[kept].sum())
    if left == 0 or 2 * left < len(prompts):
        raise InvDiffError(_too_few(index, counts, least), *_MENDS)
    out = (~kept).nonzero().squeeze(1).tolist()
    names = ", ".join(f"{index.prompts[n]!r} ({int(counts[n])})" for n in out[:_NAMED])
    more = ", …" if len(out) > _NAMED else ""
    told = (
        f"{len(out)} of {len(index.prompts)} prompts have fewer than {least} images to train on "
        f"(`min_images_per_prompt`) and are left out: {names}{more}"
    )
    return *index.of_prompts(kept), told


def _too_few(index: ImageIndex, counts: torch.Tensor, least: int) -> str:
    total, prompts = int(counts.sum()), len(index.prompts)
    if prompts == 1:
        return (
            f"{index.root} has {total} images to train on of its one prompt {index.prompts[0]!r}, "
            f"fewer than min_images_per_prompt={least}: add images, or lower it."
        )
    enough = int((counts >= least).sum())
    if total >= _REPEATED * prompts:
        most = int(counts.argmax())
        return (
            f"{index.root} has {total} images to train on, of {prompts} prompts, and "
            f"{enough or 'none'} of them with {least} or more (most: {index.prompts[most]!r}, "
            f"{int(counts[most])}): add images, or lower min_images_per_prompt={least}."
        )
    how = "occur once each" if int(counts.max()) == 1 else "hardly repeat"
    return (
        f"{index.root}: captions {how}, {prompts} captions of {len(index)} images, and "
        f"{enough or 'none'} with {least} images to train on (`min_images_per_prompt`), so "
        "that there is nothing to compare: give one prompt for all images "
        '(prompt="a photo of a …"), a file that maps captions to prompts '
        "(prompt_map=FILE.csv), or the words that make a prompt "
        "(prompts_from=words:nurse,doctor)."
    )
