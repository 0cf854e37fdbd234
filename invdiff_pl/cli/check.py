"""``check``: look over a data set before anything is trained on it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from invdiff_pl.cli.flags import data_flags
from invdiff_pl.cli.lightning import data_module
from invdiff_pl.data.index import SPLITS
from invdiff_pl.data.survey import KINDS, Survey, survey
from invdiff_pl.utils.errors import InvDiffError, in_flags
from invdiff_pl.utils.files import is_folder
from invdiff_pl.workflow.experiment import find_file, scale_files

_PROMPTS_SHOWN = 20
_PROMPT_WIDTH = 72
_MODES = {
    "L": "grey",
    "1": "black and white",
    "LA": "grey with transparency, laid over white",
    "RGBA": "with transparency, laid over white",
    "P": "with a palette",
    "CMYK": "CMYK, converted",
}


def run_check(arguments: Sequence[str]) -> int:
    """Check the data set of an experiment.

    Returns:
        exit status: 0 if it can be used as it is, 1 if something needs mending.

    Raises:
        InvDiffError: if a setting is wrong or there is no such folder.
    """
    parser = argparse.ArgumentParser(
        prog="python -m invdiff_pl check",
        description="Read every image of a data set and report what is there and what to fix.",
        epilog="Any other --data.key=value is a setting of the experiment's DataModule.",
        allow_abbrev=False,
    )
    parser.add_argument("--experiment", required=True, help="name of a file in experiments/")
    parser.add_argument("--scale", default="mini", help="name of a file in experiments/scales/")
    parser.add_argument("--experiments", type=Path, default=Path("experiments"), metavar="DIR")
    parser.add_argument("--data", required=True, type=Path, help="folder of the data set")
    options, overrides = parser.parse_known_args(arguments)
    scale = scale_files(options.scale, options.experiments)
    files = [f"{options.experiment}.yaml", "base.yaml", *scale]
    configs = [f"--config={find_file(name, options.experiments)}" for name in files]
    data = data_module([*configs, f"--experiment.data_root={options.data}", *overrides])
    if not is_folder(data.root):
        raise InvDiffError(f"data folder {data.root} does not exist: give it with DATA=.")
    flags = data_flags(type(data))
    try:
        found = survey(data)
    except InvDiffError as error:
        print(f"to fix:\n- {error.in_flags(flags)}")
        return 1
    found.notes = [in_flags(line, flags) for line in found.notes]
    found.mend = [in_flags(line, flags) for line in found.mend]
    print(describe(found, str(data.root)))
    return 1 if found.mend else 0


def describe(found: Survey, root: str) -> str:
    """Format a survey as text."""
    readable = sum(found.modes.values())
    files = [["listed", str(found.images)], ["readable", str(readable)]]
    files += [[KINDS[kind], str(tally.count)] for kind, tally in found.broken.items()]
    files += [
        [f"mode {mode}" + (f" ({_MODES[mode]})" if mode in _MODES else ""), str(count)]
        for mode, count in found.modes.most_common()
    ]
    parts = [f"{root}: {found.images} images of {len(found.prompts)} prompts", aligned(files)]
    parts.append("readable images by split" + (", prompt and attribute" if found.classes else ""))
    parts.append(aligned(_group_rows(found)))
    if len(found.prompts) > _PROMPTS_SHOWN:
        parts[-1] += f"\n… and {len(found.prompts) - _PROMPTS_SHOWN} more prompts"
    for title, lines in (("notes:", found.notes), ("to fix:", found.mend)):
        if lines:
            parts.append("\n".join([title, *(f"- {line}" for line in lines)]))
    if not found.mend:
        parts.append("nothing to fix")
    return "\n\n".join(parts)


def _group_rows(found: Survey) -> list[list[str]]:
    names = [f" {name}" for name in found.classes] or [""]
    rows = [["prompt", *(f"{split}{name}" for split in SPLITS for name in names)]]
    columns = found.groups.transpose(0, 1).flatten(1)
    for prompt, counts in zip(found.prompts[:_PROMPTS_SHOWN], columns.tolist(), strict=False):
        rows.append([_shortened(prompt), *map(str, counts)])
    if len(found.prompts) > 1:
        rows.append(["all", *map(str, columns.sum(0).tolist())])
    return rows


def _shortened(prompt: str) -> str:
    """Shorten a prompt to one line that leaves room for counts."""
    words = " ".join(prompt.split())
    return words if len(words) <= _PROMPT_WIDTH else words[: _PROMPT_WIDTH - 1] + "…"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format cells in columns: the first aligned to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    )
