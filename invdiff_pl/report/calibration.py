"""A report's section on calibration: the factor that scales the adapter, and why."""

from pathlib import Path
from typing import Any

from invdiff_pl.report.blocks import Block, Heading, Table, Text
from invdiff_pl.utils.files import read_json


def read_calibration(run_dir: Path) -> dict[str, Any] | None:
    """Read what the adapter stage counted; ``None`` if nothing was calibrated."""
    file = run_dir / "adapter" / "calibration.json"
    if not file.is_file():
        return None
    told: dict[str, Any] = read_json(file)
    return told


def calibration_section(told: dict[str, Any] | None) -> list[Block]:
    """Return the section's blocks; none if nothing was calibrated."""
    if told is None:
        return []
    title = Heading("Scale")
    if "reason" in told:
        return [title, Text(f"The adapter was not rescaled: {told['reason']}.")]
    rows = []
    for row in told["measured"]:
        groups = list(zip(*row["shares"], strict=True))  # by environment, over prompts
        means = [sum(group) / len(group) for group in groups]
        rows.append([f"{row['scale']:.2f}", *(f"{mean:.3f}" for mean in means)])
    numbers = range(len(rows[0]) - 1)
    warning = [Text(f"**Warning**: {told['warning']}.")] if "warning" in told else []
    return [
        title,
        *warning,
        Table(["scale of the trained adapter", *(f"environment {n}" for n in numbers)], rows),
        Text(
            f"Shares of the inferred environments in {told['samples']} samples at each scale, "
            "averaged over prompts. The saved adapter is the trained one multiplied by "
            f"**{told['scale']:.3f}**, at which the environments are drawn most evenly; this is "
            "its scale 1. Samples are counted by a reader of the frozen denoiser's features that "
            "was fitted to the inferred environments; labels are not read. Held-out risks, and "
            "figures during training, are of the adapter before this rescaling."
        ),
    ]
