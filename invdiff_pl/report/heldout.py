"""A report's section on held-out risks: how the checkpoint was chosen, and bounds by timestep."""

from pathlib import Path
from typing import Any

from invdiff_pl.report.blocks import Block, Heading, Table, Text
from invdiff_pl.utils.files import read_json


def read_held_out(run_dir: Path) -> dict[str, Any]:
    """Read what the adapter stage measured on held-out images, or why there is nothing."""
    file = run_dir / "adapter" / "heldout.json"
    if not file.is_file():
        return {"reason": "the adapter stage measured no held-out risks (HeldOutSelection is off)"}
    held: dict[str, Any] = read_json(file)
    return held


def held_out_section(held: dict[str, Any]) -> list[Block]:
    """Return the section's blocks."""
    title = Heading("Held-out risks")
    if "bins" not in held:
        return [title, Text(f"Not measured: {held['reason']}.")]
    header = ["timesteps"]
    for name in ("mean", "worst", "bound"):
        header += [f"{name}, before", f"{name}, after"]
    rows = [
        [
            f"{row['from']}–{row['to']}",
            *(
                f"{row[when][name]:.4f}"
                for name in ("mean", "worst", "bound")
                for when in ("before", "after")
            ),
        ]
        for row in held["bins"]
    ]
    chosen = held["selection"]["chosen_step"]
    steps = ", ".join(str(candidate["step"]) for candidate in held["selection"]["candidates"])
    return [
        title,
        Table(header, rows),
        Text(
            "Mean and worst denoising risk of the inferred environments on training images that "
            "the adapter was not trained on, with the bound worst ≤ mean + √((G − 1) Var), where "
            f"Var is the variance over the G environments. Step {chosen} is kept of steps {steps}: "
            "the last whose held-out objective is within one standard error of the lowest; labels "
            "are not read."
        ),
    ]
