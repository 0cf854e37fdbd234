"""Finding the backbones that are shipped with the package."""

from importlib import resources
from pathlib import Path

from invdiff_pl.utils.errors import InvDiffError

ASSET_PREFIX = "asset:"


def resolve_backbone(backbone: str) -> str:
    """Return the folder or hub id that a setting means; ``asset:NAME`` is a shipped backbone.

    Raises:
        InvDiffError: if no asset of that name is shipped.
    """
    if not backbone.startswith(ASSET_PREFIX):
        return backbone
    name = backbone.removeprefix(ASSET_PREFIX)
    folder = Path(str(resources.files("invdiff_pl") / "assets" / name))
    if not (folder / "model_index.json").is_file():
        raise InvDiffError(
            f"no backbone {name!r} is shipped: {folder} holds no model_index.json; give a pipeline "
            "folder with BACKBONE=, or train one with `make backbone`."
        )
    return str(folder)
