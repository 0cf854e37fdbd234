"""The reference of samples: a balanced set of real images, with its features kept on disk."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.cache import ShardedTensor, build_shards
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_bytes, digest_json

DESCRIPTION = "test split, equally many images of each (prompt, attribute)"
_BATCH = 128


def balanced_rows(prompts: Tensor, attributes: Tensor) -> Tensor:
    """Choose rows with equally many images of each (prompt, attribute) cell: the first of each.

    Only prompts that occur with every attribute class have cells.

    Args:
        prompts: number of each image's prompt, int64 ``[N]``.
        attributes: attribute class of each image, int64 ``[N]``.

    Returns:
        int64 row numbers, ascending.

    Raises:
        InvDiffError: if no prompt occurs with every attribute class.
    """
    classes = int(attributes.max()) + 1
    cells = prompts * classes + attributes
    sizes = cells.bincount(minlength=(int(prompts.max()) + 1) * classes).reshape(-1, classes)
    complete = (sizes > 0).all(1)
    if not complete.any():
        raise InvDiffError(
            "no prompt has test images of every attribute class, so there is no balanced set to "
            "measure the Fréchet distance to."
        )
    smallest = int(sizes[complete].min())
    order = cells.argsort(stable=True)
    starts = sizes.flatten().cumsum(0) - sizes.flatten()
    rank_in_cell = torch.empty_like(order)
    rank_in_cell[order] = torch.arange(len(order)) - starts[cells[order]]
    return ((rank_in_cell < smallest) & complete[prompts]).nonzero().squeeze(1)


def reference_rows(data: BiasedDataModule) -> Tensor:
    """Return the balanced rows of a data set's test split, int64."""
    prompts, attributes = data.labels("test")
    if attributes is None:
        raise InvDiffError(f"{data.why_not_scored}.")
    return balanced_rows(prompts, attributes)


def reference_features(
    data: BiasedDataModule,
    rows: Tensor,
    encode: Callable[[Tensor], Tensor],
    identity: dict[str, Any],
    *,
    build: bool,
    barrier: Callable[[], object],
) -> ShardedTensor:
    """Return features of rows of the test split, float32 ``[N, D]``, computed once and kept.

    They are kept in ``cache_dir/reference`` under a key made from the images' content, their
    resolution, the rows and the encoder, so that runs share them exactly where these agree.

    Args:
        data: DataModule whose test split and cache folder are used.
        rows: rows of the test split, int64 ``[N]``.
        encode: function from uint8 images ``[B, 3, H, W]`` to features ``[B, D]``.
        identity: what tells the encoder from others: name, input size, digest of the weights.
        build: whether this process computes what is missing; one process per node does.
        barrier: function that waits for the other processes.
    """
    key = {
        "images": data.content_key("test"),
        "rows": digest_bytes(rows.numpy().tobytes()),
        "encoder": identity,
    }
    folder = data.cache_dir / "reference" / digest_json(key)
    if build:
        images = data.images("test")

        def compute(numbers: Any) -> Tensor:
            chunks = rows[torch.tensor(numbers)].split(_BATCH)
            return torch.cat([encode(images.gather(chunk)).float().cpu() for chunk in chunks])

        build_shards(folder, len(rows), compute, f"features of test images, {identity['name']}")
    barrier()
    return ShardedTensor(folder)
