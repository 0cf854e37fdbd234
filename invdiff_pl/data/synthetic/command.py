"""``render``: draw a stand-in data set."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from invdiff_pl.data.synthetic.celeba import RenderedCelebA, render_celeba
from invdiff_pl.data.synthetic.fairface import RenderedFairFace, render_fairface
from invdiff_pl.data.synthetic.waterbirds import RenderedWaterbirds, render_waterbirds
from invdiff_pl.utils.errors import InvDiffError

RENDERERS: dict[str, tuple[type[Any], Callable[[Path, Any], None]]] = {
    "celeba": (RenderedCelebA, render_celeba),
    "fairface": (RenderedFairFace, render_fairface),
    "waterbirds": (RenderedWaterbirds, render_waterbirds),
}


def run_render(arguments: Sequence[str]) -> None:
    """Draw a stand-in data set into ``RUN/data/images``.

    Raises:
        InvDiffError: if a setting is out of range.
    """
    parser = argparse.ArgumentParser(prog="python -m invdiff_pl render", allow_abbrev=False)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder")
    known, _ = parser.parse_known_args(arguments)
    if known.experiment not in RENDERERS:
        raise InvDiffError(
            f"no stand-in pictures can be drawn for {known.experiment}: give the data set's folder "
            "with DATA= (or --data)."
        )
    settings_type, render = RENDERERS[known.experiment]
    for field in fields(settings_type):
        kind = float if field.default is None else type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    options = vars(parser.parse_args(arguments))
    given = {field.name: options[field.name] for field in fields(settings_type)}
    try:
        settings = settings_type(**given)
    except InvDiffError as error:
        raise error.in_flags({name: f"--{name}" for name in given}) from None
    root = options["run_dir"] / "data" / "images"
    render(root, settings)
    print(f"drawn into {root}")
