"""The text of a run's report, from the content of ``report.json``."""

from collections.abc import Sequence
from typing import Any

from invdiff_pl.report.blocks import Block, Heading, Picture, Table, Text
from invdiff_pl.report.calibration import calibration_section
from invdiff_pl.report.figures import TITLES, figure_blocks, interval_text
from invdiff_pl.report.heldout import held_out_section
from invdiff_pl.utils.labels import legend


def report_blocks(report: dict[str, Any], pictures: dict[str, Sequence[str]]) -> list[Block]:
    """Compose the report that people read.

    Args:
        report: the content of ``report.json``.
        pictures: files relative to the report's folder by name: ``bias``, ``pareto``, ``grid``,
            ``scores``, ``sheets`` and ``curves``, with none, one or several for each.
    """
    scored = report["bias"]["after"] is not None
    return [
        Heading(f"InvDiff on {report['experiment']} ({report['scale']}, seed {report['seed']})", 1),
        *(
            figure_blocks(report)
            if scored
            else [Text(f"**Not scored:** {report['bias']['reason']}.")]
        ),
        *_adapter(report["adapter"]),
        *(_bias_by_prompt(report, pictures["bias"]) if scored else []),
        *_shown(
            "Bias against quality",
            pictures["pareto"],
            "Each point is one sampled scale: lower Bias and Fréchet distance are better, as are "
            "higher prompt accuracy and recall.",
        ),
        *_augmentation(report),
        *_shown(
            "The same seeds before and after",
            pictures["grid"],
            "Each pair of rows is one prompt: the backbone above, the adapted model below, from "
            "the same noise.",
        ),
        *_legend(report["environments"]["prompts"]),
        Heading("Environments"),
        *_environments(report["environments"]),
        *_environments_by_prompt(report["environments"]),
        *(Picture(file, "Scores by environment") for file in pictures["scores"]),
        *(
            Picture(file, f"Contact sheet {number}")
            for number, file in enumerate(pictures["sheets"], start=1)
        ),
        *held_out_section(report["held_out"]),
        *calibration_section(report.get("calibration")),
        *_shown(
            "Training",
            pictures["curves"],
            "From TensorBoard's event files. During training, Bias and distances are measured on "
            "few samples and show only the trend; the table above has the figures.",
        ),
        Heading("Time"),
        Table(["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in report["seconds"].items()]),
        *([Text(_small_print(report))] if scored else []),
        *_left_out(report),
        Text(
            f"Hardware: {report['hardware']}. Revision {report['revision']}, {report['created']}. "
            f"`{report['replay']}` repeats the run in another folder and compares the results."
        ),
    ]


def _shown(title: str, files: Sequence[str], caption: str) -> list[Block]:
    return [Heading(title), *(Picture(file, caption) for file in files)] if files else []


def _legend(prompts: Sequence[str]) -> list[Block]:
    """List the prompts that pictures show by number."""
    rows = [[str(number), prompt] for number, prompt in legend(prompts)]
    return [Table(["number in pictures", "prompt"], rows)] if rows else []


def _adapter(adapter: dict[str, Any]) -> list[Block]:
    size = (
        f"Adapter: {adapter['kind']}, {adapter['parameters']:,} parameters, "
        f"{100 * adapter['share']:.2f} % of the denoiser's."
    )
    if adapter.get("trained", True):
        return [Text(size)]
    return [
        Text(f"**Nothing was trained:** {adapter['reason']}. Before and after are the same."),
        Text(size),
    ]


def _bias_by_prompt(report: dict[str, Any], pictures: Sequence[str]) -> list[Block]:
    return [
        Heading("Bias by prompt"),
        _per_prompt(report),
        Text(
            "Bias is 0 for even shares, and 2/K if all samples show one of K attribute classes. "
            f"{report['bias']['samples_per_prompt']} samples per prompt; 95 % intervals. "
            "“Balanced sampler” is the Bias that a perfectly balanced sampler would show with this "
            "number of samples."
        ),
        *(Picture(file, "Bias by prompt, with 95 % intervals") for file in pictures),
    ]


def _per_prompt(report: dict[str, Any]) -> Table:
    bias = report["bias"]
    rows = []
    for prompt, after in bias["after"]["per_prompt"].items():
        before = bias["before"]["per_prompt"][prompt]
        own = bias["data"]["per_prompt"][prompt]
        rows.append(
            [
                prompt,
                f"{own['bias']:.2f}",
                _prompt_bias(before),
                _counts(before["counts"]),
                _prompt_bias(after),
                _counts(after["counts"]),
                f"{after['balanced_sampler_would_show']:.2f}",
            ]
        )
    header = ["prompt", "data", "before", "counts", "after", "counts", "balanced sampler"]
    return Table(header, rows)


def _augmentation(report: dict[str, Any]) -> list[Block]:
    found = report.get("augmentation")
    if found is None:
        return []
    rows = [
        [
            title,
            f"{100 * found[name]['worst_group']:.1f} % "
            f"{interval_text(found[name]['worst_group_interval'], 100, 1)}",
            found[name]["worst_group_name"],
            f"{100 * found[name]['mean']:.1f} %",
        ]
        for name, title in (("real", "real images"), ("augmented", "real and debiased images"))
    ]
    text = (
        "A classifier predicts the prompts of test images. It is trained without attribute labels, "
        "on the biased training split alone or together with debiased samples. The worst group is "
        "the (prompt, attribute) pair with the lowest accuracy."
    )
    table = Table(["trained on", "worst group", "which", "mean over groups"], rows)
    return [Heading("A classifier trained on debiased samples"), Text(text), table]


def _environments(environments: dict[str, Any]) -> list[Block]:
    """Report what was found, candidate by candidate."""
    auc, verdict = environments["auc"], environments["bias_found"]
    found = {True: "yes", False: "no", None: "not tested"}[verdict]
    rows = [
        ["bias found", f"{found}: {environments['verdict_reason']}"],
        ["features", environments["features"]],
        ["groups", str(environments["groups"])],
    ]
    trained, default = environments["trained_on"], environments["candidate"]
    if trained and trained != [default]:
        rows.append(
            ["trained on", f"candidates {', '.join(map(str, trained))}, chosen by a person"]
        )
    if auc is not None:
        what = (
            "AUC of the default candidate for bias-conflicting images (labels are only used here)"
        )
        rows.append([what, f"{auc:.4f}"])
    candidates = [
        [
            str(number),
            candidate["verdict"],
            f"{candidate['evidence']:.3f}",
            f"{candidate['alignment']:.2f}",
            f"{candidate['p_value']:.3g}",
            candidate["reason"],
        ]
        for number, candidate in enumerate(environments["candidates"])
    ]
    header = ["candidate", "verdict", "evidence (nats per image)", "alignment", "p", "why"]
    return [Table(["", ""], rows), *([Table(header, candidates)] if candidates else [])]


def _environments_by_prompt(environments: dict[str, Any]) -> list[Block]:
    """Tabulate shares by prompt and group, for the first candidate whose verdict is a bias."""
    if environments["candidate"] is None:
        return []
    chosen = environments["candidates"][environments["candidate"]]
    entries = environments["quality"]["per_prompt"]
    shared = zip(
        environments["prompts"], chosen["shares"], chosen["intervals"], entries, strict=True
    )
    rows = []
    for prompt, shares, intervals, entry in shared:
        area = "" if entry.get("auc") is None else f"{entry['auc']:.4f}"
        sure = f"{entry['confidence']:.3f}" if "confidence" in entry else ""
        for group, (share, interval) in enumerate(zip(shares, intervals, strict=True)):
            told = "" if share is None else f"{share:.3f} {interval_text(interval)}"
            rest = [sure, area] if group == 0 else ["", ""]
            rows.append([prompt if group == 0 else "", str(group), told, *rest])
    sureness = "mean membership"  # of the likelier group
    return [Table(["prompt", "group", "share of the prompt's images", sureness, "AUC"], rows)]


def _small_print(report: dict[str, Any]) -> str:
    distance, classifier = report["frechet_distance"], report["classifier"]
    told = (
        f"Attributes and prompts were predicted by a classifier whose held-out accuracy is "
        f"{100 * classifier['attribute']:.1f} % (attribute) and {100 * classifier['prompt']:.1f} % "
        "(prompt)."
    )
    if distance["before"] is None:
        return told
    return (
        f"{told} Fréchet distance: backend {distance['backend']}, extractor "
        f"{distance['extractor']}, images resized to {distance['resize']}, {distance['n']} samples "
        f"against {distance['reference_images']} images ({distance['reference']})."
    )


def _left_out(report: dict[str, Any]) -> list[Block]:
    figures = {
        "Fréchet distance": report["frechet_distance"],
        **{TITLES[name]: found for name, found in report.get("distances", {}).items()},
        "CLIP-T": report["clip_t"],
    }
    scored = report["bias"]["after"] is not None
    missing = [[n, f["reason"]] for n, f in figures.items() if f["before"] is None and scored]
    return [Heading("Left out"), Table(["figure", "why"], missing)] if missing else []


def _prompt_bias(bias: dict[str, Any]) -> str:
    return f"{bias['bias']:.2f} {interval_text(bias['interval'], digits=2)}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
