"""A page that shows the candidates side by side, for the person who decides."""

from typing import Any

import numpy as np
from PIL import Image

from invdiff_pl.environments.candidate import Candidate, most_frequent
from invdiff_pl.environments.discovery import SHOWN, Discovery
from invdiff_pl.utils.sheets import TILE
from invdiff_pl.utils.templates import data_uri, render

# Numbers of prompts, groups per prompt and images per group shown; the page says what is left out.
PROMPTS = 6
GROUPS = 6
_COLUMNS, _ROWS = 4, 2


def discovery_page(found: Discovery) -> str:
    """Render the first five candidates of a discovery as an HTML page that needs no other file.

    Args:
        found: the discovery.

    Returns:
        HTML with pictures inside it; all text is escaped, and the page loads and runs nothing.
    """
    prompts = most_frequent(found.images, PROMPTS)
    return render(
        "discover.html",
        images=len(found.images.prompt_ids),
        prompts=len(found.images.prompts),
        left_out=len(found.images.prompts) - len(prompts),
        chosen=found.chosen,
        more=max(0, len(found) - SHOWN),
        candidates=[
            {
                **candidate.facts(),
                "number": number,
                "hidden_groups": max(0, candidate.memberships.shape[1] - GROUPS),
                "prompts": [_prompt(candidate, prompt) for prompt in prompts],
            }
            for number, candidate in enumerate(found[:SHOWN])
        ],
    )


def _prompt(candidate: Candidate, prompt: int) -> dict[str, Any]:
    """Return what the page shows of a prompt: its groups, the most frequent overall first."""
    shares, intervals = candidate.shares[prompt], candidate.intervals[prompt]
    rows = []
    for group in range(min(GROUPS, len(shares))):
        low, high = (100 * intervals[group]).tolist()
        rows.append(
            {
                "group": candidate.names[group] if candidate.names else f"group {group}",
                "share": f"{100 * float(shares[group]):.0f} %",
                "interval": f"[{low:.0f}, {high:.0f}]",
                "picture": _strip(candidate, prompt, group),
            }
        )
    return {"text": candidate.images.prompts[prompt], "groups": rows}


def _strip(candidate: Candidate, prompt: int, group: int) -> str | None:
    """Return a grid of a group's most typical images, as a data URI; ``None`` without any."""
    rows = candidate.typical(prompt, group, _COLUMNS * _ROWS)
    if not rows:
        return None
    height = -(-len(rows) // _COLUMNS) * TILE
    strip = Image.new("RGB", (_COLUMNS * TILE, height), "white")
    for place, pixels in enumerate(candidate.images.pixels(rows, TILE)):
        tile = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        strip.paste(tile, (place % _COLUMNS * TILE, place // _COLUMNS * TILE))
    return data_uri(strip)
