"""What a setting means by a backbone: a folder, a hub id or a shipped one."""

from importlib import resources
from pathlib import Path

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_folder, digest_json, is_file, is_folder

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
    if not is_file(folder / "model_index.json"):
        raise InvDiffError(
            f"no backbone {name!r} is shipped: {folder} holds no model_index.json; give a pipeline "
            "folder with BACKBONE=, or train one with `make backbone`."
        )
    return str(folder)


def backbone_digest(backbone: str, part: str = ".") -> str:
    """Compute the digest of a folder's content, without Markdown and hidden files, or of a hub id.

    Args:
        backbone: pipeline folder, hub id or ``asset:NAME``.
        part: folder of the pipeline that the digest is of, such as ``vae``; all if not given.
    """
    source = Path(resolve_backbone(backbone))
    if is_folder(source):
        return digest_folder(source / part, documents=False)
    return digest_json([backbone, part])
