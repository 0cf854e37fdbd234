"""An audit's page: one HTML file that loads and runs nothing."""

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np

from invdiff_pl.metrics.audit_counts import AuditCounts
from invdiff_pl.metrics.intervals import wilson_interval
from invdiff_pl.metrics.measures import MEASURES
from invdiff_pl.report.figures import estimate_text
from invdiff_pl.utils.labels import plain, prompt_label
from invdiff_pl.utils.sheets import contact_sheet
from invdiff_pl.utils.templates import render

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_SHEETS = 24  # prompts whose samples are shown
_COLUMNS = 10
_TO_PLOT = 60  # prompts whose shares are plotted


def audit_page(audit: AuditCounts, figures: Sequence[dict[str, Any]]) -> str:
    """Render the page as text.

    Args:
        audit: counts and pictures of the audit.
        figures: the result of ``audit.figures()``.
    """
    shown = audit.prompts[:_SHEETS]
    return render(
        "audit.html",
        prompts=audit.prompts,
        summary=[line for name in audit.classes for line in _summary(audit, name, figures)],
        notes=audit.notes,
        facts=_facts(audit),
        titles=[measure.title for measure in MEASURES],
        first_scale=f"{audit.guidance_scales[0]:g}",
        attributes=[_attribute(audit, name, figures) for name in audit.classes],
        sheets=[_sheet(audit, number) for number in range(len(shown))],
        left_out=len(audit.prompts) - len(shown),
    )


def _of(figures: Sequence[dict[str, Any]], attribute: str) -> list[dict[str, Any]]:
    return [each for each in figures if each["attribute"] == attribute]


def _summary(audit: AuditCounts, attribute: str, figures: Sequence[dict[str, Any]]) -> list[str]:
    """Summarise Bias at the first guidance scale, before and after, in one sentence."""
    scale = audit.guidance_scales[0]
    told = []
    for each in _of(figures, attribute):
        if each["guidance_scale"] == scale:
            told.append(f"{estimate_text(each['measures']['bias'])} {each['when']}")
    return [f"{attribute}: Bias {', '.join(told)}, at guidance scale {scale:g}."]


def _facts(audit: AuditCounts) -> list[tuple[str, str]]:
    settings = audit.settings
    seeds = sorted({cell.seed for cell in audit.cells})
    facts = [
        ("samples per prompt", f"{settings['per_prompt']} per guidance scale and seed"),
        ("denoising steps", str(settings["steps"])),
        ("guidance scales", ", ".join(f"{scale:g}" for scale in audit.guidance_scales)),
        ("seeds", ", ".join(map(str, seeds))),
    ]
    if "backbone" in settings:
        facts.insert(0, ("backbone", settings["backbone"]))
    return [*facts, ("LoRA", ", ".join(settings["loras"]))] if settings["loras"] else facts


def _attribute(
    audit: AuditCounts, attribute: str, figures: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    own = _of(figures, attribute)
    scale = audit.guidance_scales[0]
    rows = [
        {
            "scale": each["guidance_scale"],
            "when": each["when"],
            "measures": [(m["mean"], m["interval"]) for m in each["measures"].values()],
            "corrected": each["errors_taken_out"],
        }
        for each in own
    ]
    seeds = len(own[0]["measures"]["bias"]["by_seed"])
    spread = [np.std(each["measures"]["bias"]["by_seed"]) for each in own]
    target = own[0]["target"]
    return {
        "name": attribute,
        "classes": own[0]["classes"],
        "target": target if target == "even" else ", ".join(f"{q:g}" for q in target[0]),
        "rows": rows,
        "corrected": any(row["corrected"] for row in rows),
        "seeds": f"Bias varies between the {seeds} seeds with a standard deviation of at most "
        f"{max(spread):.3f}."
        if seeds > 1
        else "",
        "by_scale": _plot_by_scale(own) if len(audit.guidance_scales) > 1 else "",
        "shares": _plot_shares(audit, [e for e in own if e["guidance_scale"] == scale]),
        "examples": _examples(audit, attribute),
        "prompts": _prompt_rows(audit, [e for e in own if e["guidance_scale"] == scale]),
    }


def _prompt_rows(audit: AuditCounts, tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for number, prompt in enumerate(audit.prompts):
        for place, table in enumerate(tables):
            counts = audit.counts(table["attribute"], table["when"])[number]
            ends = wilson_interval(counts, counts.sum().expand_as(counts)).tolist()
            shares = (counts / counts.sum()).tolist()
            rows.append(
                {
                    "prompt": prompt if place == 0 else "",
                    "when": table["when"],
                    "shares": list(zip(shares, ends, strict=True)),
                    "bias": table["measures"]["bias"]["per_prompt"][number],
                }
            )
    return rows


def _plot_by_scale(own: Sequence[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for when in dict.fromkeys(each["when"] for each in own):
        points = sorted(
            (e["guidance_scale"], e["measures"]["bias"]) for e in own if e["when"] == when
        )
        scales = [scale for scale, _ in points]
        values = np.array([bias["mean"] for _, bias in points])
        ends = np.array([bias["interval"] for _, bias in points]).T
        axes.errorbar(scales, values, np.abs(ends - values), marker="o", capsize=3, label=when)
    axes.set_xlabel("guidance scale")
    axes.set_ylabel("Bias")
    axes.set_ylim(0, 1.05 * max(each["measures"]["bias"]["interval"][1] for each in own))
    axes.legend(frameon=False)
    return _inline(figure)


def _plot_shares(audit: AuditCounts, tables: Sequence[dict[str, Any]]) -> str:
    """Plot shares as stacked bars, one row per prompt, in one panel before and one after."""
    labels = [plain(prompt_label(p, n)) for n, p in enumerate(audit.prompts)][:_TO_PLOT]
    height = 1.1 + 0.24 * len(labels)
    panels = len(tables)
    figure, axes = plt.subplots(
        1, panels, figsize=(2.2 + 3.2 * panels, height), sharey=True, squeeze=False
    )
    for place, table in zip(axes[0], tables, strict=True):
        counts = np.array(table["counts"][:_TO_PLOT], dtype=float)
        shares = counts / counts.sum(1, keepdims=True)
        left = np.zeros(len(shares))
        for number, name in enumerate(table["classes"]):
            place.barh(range(len(shares)), shares[:, number], left=left, label=plain(name))
            left += shares[:, number]
        place.set_title(table["when"], fontsize=10)
        place.set_xlim(0, 1)
        place.set_yticks(range(len(labels)), labels)
        for level in np.linspace(0, 1, len(table["classes"]) + 1)[1:-1]:
            place.axvline(level, color="black", linewidth=0.6, linestyle=":")
    axes[0][0].invert_yaxis()
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, ncols=min(4, len(names)), loc="lower center")
    figure.tight_layout(rect=(0, min(0.3, 0.35 * -(-len(names) // 4) / height), 1, 1))
    return _inline(figure, tight=False)


def _inline(figure: Figure, tight: bool = True) -> str:
    if tight:
        figure.tight_layout()
    target = BytesIO()
    figure.savefig(target, format="png", dpi=120)
    plt.close(figure)
    return _data("png", target)


def _sheet(audit: AuditCounts, number: int) -> dict[str, str]:
    """Draw samples of a prompt at the first seed, by guidance scale, before and after."""
    seed = audit.cells[0].seed
    cells = [cell for cell in audit.cells if cell.seed == seed]
    cells.sort(key=lambda cell: audit.guidance_scales.index(cell.guidance_scale))
    rows = {f"{c.when}, guidance {c.guidance_scale:g}": audit.pictures[c][number] for c in cells}
    target = BytesIO()
    heading = prompt_label(audit.prompts[number], number, 60)
    contact_sheet(heading, rows, _COLUMNS).save(target, "JPEG", quality=85)
    return {"prompt": audit.prompts[number], "source": _data("jpeg", target)}


def _examples(audit: AuditCounts, attribute: str) -> str:
    """Draw samples of each class, from all prompts in turn, to show what a reader means by it."""
    cell = audit.cells[0]
    pictures = audit.pictures[cell]
    read = audit.readings[attribute][cell][:, : pictures.shape[1]]
    # The first samples of all prompts, then the second ones, and so on.
    shown, classes = pictures.transpose(0, 1).flatten(0, 1), read.T.flatten()
    rows = {
        plain(name): shown[classes == number][:_COLUMNS]
        for number, name in enumerate(audit.classes[attribute])
    }
    target = BytesIO()
    contact_sheet("examples of each class", rows, _COLUMNS).save(target, "JPEG", quality=85)
    return _data("jpeg", target)


def _data(kind: str, content: BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
