"""Reports as Markdown."""

from collections.abc import Sequence
from typing import Any

from invdiff_pl.report.heldout import held_out_section

# Held-out accuracy below which the classifier's figures are called untrustworthy.
TRUSTED_ACCURACY = 0.95


def markdown(report: dict[str, Any]) -> str:
    """A run's report for people, from the content of ``report.json``."""
    scored = report["bias"]["after"] is not None
    parts = [
        f"# InvDiff on {report['experiment']} ({report['scale']}, seed {report['seed']})",
        *(_scores(report) if scored else [f"**Not scored:** {report['bias']['reason']}."]),
        _adapter(report["adapter"]),
        *(_bias_by_prompt(report) if scored else []),
        "## The same seeds before and after",
        "![Samples: the backbone's above, the adapted model's below](grid.png)",
        "Each pair of rows is one prompt: above the backbone, below the adapted model, from the "
        "same noise.",
        "## Environments",
        _environments(report["environments"]),
        "![Scores by environment](scores.png)",
        *held_out_section(report["held_out"]),
        "## Time",
        _table(["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in report["seconds"].items()]),
        *([_small_print(report)] if scored else []),
        f"Hardware: {report['hardware']}. Revision {report['revision']}, {report['created']}.",
    ]
    return "\n\n".join(parts) + "\n"


def _bias_by_prompt(report: dict[str, Any]) -> list[str]:
    return [
        "## Bias by prompt",
        _per_prompt(report),
        "Bias 0 is balanced, 1 is one attribute class only. "
        f"{report['bias']['samples_per_prompt']} samples a prompt; 95 % intervals. *Balanced "
        "sampler* is the Bias that a perfectly balanced sampler would show at this number of "
        "samples.",
        "![Bias by prompt](bias.png)",
    ]


def _adapter(adapter: dict[str, Any]) -> str:
    return (
        f"Adapter: {adapter['kind']}, {adapter['parameters']:,} parameters, "
        f"{100 * adapter['share']:.2f} % of the denoiser's."
    )


def _scores(report: dict[str, Any]) -> list[str]:
    return [_headline(report), *_warnings(report)]


def _headline(report: dict[str, Any]) -> str:
    bias, accuracy = report["bias"], report["prompt_accuracy"]
    distance = report["frechet_distance"]
    rows = [
        ["Bias, mean over prompts", *(_estimate(bias[key]) for key in ("data", "before", "after"))],
        [
            "Prompt accuracy",
            "",
            *(
                f"{100 * accuracy[key]:.1f} % {_interval(accuracy[f'interval_{key}'], 100, 1)}"
                for key in ("before", "after")
            ),
        ],
        [
            f"Fréchet distance ({distance['extractor']}) to a balanced set",
            "",
            f"{distance['before']:.2f}",
            f"{distance['after']:.2f}",
        ],
        *(
            [
                f"{name.capitalize()} (k = {report[name]['neighbours']}, same features)",
                "",
                f"{report[name]['before']:.3f}",
                f"{report[name]['after']:.3f}",
            ]
            for name in ("precision", "recall")
            if report[name]["before"] is not None
        ),
    ]
    clip = report["clip_t"]
    if clip["before"] is not None:
        rows.append(["CLIP-T", "", f"{clip['before']:.2f}", f"{clip['after']:.2f}"])
    return _table(["", "training data", "before", "after"], rows)


def _warnings(report: dict[str, Any]) -> list[str]:
    """What keeps the figures from being trusted."""
    weak = [
        f"{100 * accuracy:.1f} % ({name})"
        for name, accuracy in report["classifier"].items()
        if accuracy < TRUSTED_ACCURACY
    ]
    if not weak:
        return []
    return [
        f"**Warning:** on held-out images the classifier is right on only {', '.join(weak)}, so "
        "figures that rest on it (Bias, prompt accuracy) are not to be trusted: train it on more "
        "labelled images."
    ]


def _per_prompt(report: dict[str, Any]) -> str:
    bias = report["bias"]
    rows = []
    for prompt, after in bias["after"]["per_prompt"].items():
        before = bias["before"]["per_prompt"][prompt]
        own = bias["data"]["per_prompt"][prompt]
        rows.append(
            [
                _escaped(prompt),
                f"{own['bias']:.2f}",
                _prompt_bias(before),
                _counts(before["counts"]),
                _prompt_bias(after),
                _counts(after["counts"]),
                f"{after['balanced_sampler_would_show']:.2f}",
            ]
        )
    header = ["prompt", "data", "before", "counts", "after", "counts", "balanced sampler"]
    return _table(header, rows)


def _environments(environments: dict[str, Any]) -> str:
    auc, agreement = environments["auc"], environments["split_half_rank_correlation"]
    rows = [["groups", str(environments["groups"])], ["score", environments["score"]]]
    if agreement is not None:
        rows.append(["rank correlation of scores between noise draws", f"{agreement:.3f}"])
    if auc is not None:
        rows.append(["AUC for bias-conflicting images (labels used here only)", f"{auc:.4f}"])
    return _table(["", ""], rows)


def _small_print(report: dict[str, Any]) -> str:
    distance, classifier = report["frechet_distance"], report["classifier"]
    return (
        f"Attributes and prompts were read off by a classifier of held-out accuracy "
        f"{100 * classifier['attribute']:.1f} % (attribute) and {100 * classifier['prompt']:.1f} % "
        f"(prompt). Fréchet distance: backend {distance['backend']}, extractor "
        f"{distance['extractor']}, images resized to {distance['resize']}, {distance['n']} samples "
        f"against {distance['reference_images']} images ({distance['reference']})."
    )


def _estimate(bias: dict[str, Any]) -> str:
    return f"{bias['mean']:.3f} {_interval(bias['interval'])}"


def _prompt_bias(bias: dict[str, Any]) -> str:
    return f"{bias['bias']:.2f} {_interval(bias['interval'], digits=2)}"


def _interval(interval: Sequence[float], factor: float = 1, digits: int = 3) -> str:
    low, high = (f"{factor * value:.{digits}f}" for value in interval)
    return f"[{low}, {high}]"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
