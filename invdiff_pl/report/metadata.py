"""The metadata block of a model card, as the Hugging Face hub reads it."""

from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id


def with_metadata(
    text: str, base: str | None, relation: Literal["adapter", "finetune"], *tags: str
) -> str:
    """Put a block before a card that names library, task, tags and, if on the hub, its base.

    Args:
        text: text of the card, in Markdown.
        base: pipeline folder, hub id or ``asset:NAME`` of the model that it was made from, if any.
        relation: relation to that model.
        tags: further tags.
    """
    on_hub = base is not None and _is_hub_id(base)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "invdiff", *tags],
        base_model=base if on_hub else None,
        base_model_relation=relation if on_hub else None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()
