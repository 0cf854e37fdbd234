"""The model card of a newly trained backbone."""

from pathlib import Path
from typing import Any

from invdiff_pl.report.figures import estimate_text
from invdiff_pl.report.metadata import with_metadata
from invdiff_pl.report.plots import write_grids
from invdiff_pl.utils.files import read_json, write_text
from invdiff_pl.workflow.records import RECORD

# Largest difference between the samples' and the data's Bias at which debiasing makes sense.
TOLERANCE = 0.1
# Parts of new pipelines, besides the networks trained here.
_NEW = {
    "StableDiffusionPipeline": (
        "`CLIPTextModel` with random, frozen weights; a `CLIPTokenizer` that knows the words of "
        "the prompts; v-prediction with zero terminal signal-to-noise ratio."
    ),
    "SanaPipeline": (
        "`Gemma2Model` with random, frozen weights; a tokenizer that knows the words of the "
        "prompts; flow matching. Call it with `height`, `width`, `use_resolution_binning=False`."
    ),
}


def write_card(run_dir: Path) -> None:
    """Write ``README.md`` into the backbone's folder, and the card and samples into ``RUN/card``.

    Raises:
        InvDiffError: if the backbone has not been trained and sampled.
    """
    metrics = read_json(run_dir / "backbone_samples" / "metrics.json")
    records = {
        name: read_json(run_dir / name / RECORD) for name in ("backbone", "backbone_samples")
    }
    start = Path(records["backbone"]["config"]["experiment"]["start"])
    if start == run_dir / "autoencoder" / "pipeline":
        records["autoencoder"] = read_json(run_dir / "autoencoder" / RECORD)
    folder = run_dir / "card"
    folder.mkdir(parents=True, exist_ok=True)
    write_grids(run_dir / "backbone_samples", folder / "samples.png")
    index = read_json(run_dir / "backbone" / "pipeline" / "model_index.json")
    text = card(metrics, records, index)
    write_text(folder / "card.md", text)
    base = None if "autoencoder" in records else str(start)
    readme = with_metadata(text, base, "finetune")
    write_text(run_dir / "backbone" / "pipeline" / "README.md", readme)


def card(metrics: dict[str, Any], records: dict[str, Any], index: dict[str, Any]) -> str:
    """Compose the card's text.

    Args:
        metrics: metrics of the samples.
        records: records of the stages, by name.
        index: ``model_index.json`` of the pipeline.
    """
    record = records["backbone"]
    config = record["config"]
    first = records.get("autoencoder")
    minutes = (record["seconds"] + (first["seconds"] if first else 0)) / 60
    steps = f"{config['trainer']['max_steps']}" + (
        f", after {first['config']['trainer']['max_steps']} of the autoencoder" if first else ""
    )
    start = config["experiment"]["start"]
    origin = "from scratch" if first else f"from `{start}`,"
    pipeline = index["_class_name"]
    denoiser = next(index[part][1] for part in ("unet", "transformer") if part in index)
    parts = f"`{denoiser}` trained here; all other parts are those of `{start}`."
    if first:
        parts = f"`{index['vae'][1]}` and `{denoiser}` trained here; {_NEW[pipeline]}"
    known = "It knows only the words of its prompts. " if first else ""
    family = config["experiment"].get("family", "sd")
    given = f" FAMILY={family}" if family != "sd" else ""
    given += "" if first else f" BACKBONE={start}"
    changed = _changes(record)
    if first:
        own = [word for word in _changes(first) if word not in changed]
        changed += [f"--autoencoder.{word[2:]}" for word in own]
    if changed:
        given += f' ARGS="{" ".join(changed)}"'
    return f"""\
# A small, deliberately biased text-to-image model: {config["experiment"]["name"]}

A `{pipeline}` of {config["data"]["init_args"]["resolution"]}-pixel images, trained \
{origin} on the biased training split of rendered or given pictures, so that the bias can be \
found and mitigated. It has no other use.

Load it with `diffusers.{pipeline}.from_pretrained(FOLDER)`. Parts: {parts}

| | |
| --- | --- |
{_figures(metrics)}
| samples per prompt, steps, guidance scale | {metrics["samples_per_prompt"]}, \
{records["backbone_samples"]["config"]["model"]["init_args"]["steps"]}, \
{records["backbone_samples"]["config"]["model"]["init_args"]["guidance_scale"]} |
| training steps of the denoiser | {steps} |
| seed | {config["seed_everything"]} |
| training time | {minutes:.0f} minutes |
| hardware | {record["hardware"]} |

Made with

```
make backbone EXP={config["experiment"]["name"]} SCALE={config["experiment"]["scale"]} \
SEED={config["seed_everything"]}{given}
```

## Limits

It is meant for trying methods against bias, not for making pictures for use, nor for judging \
people. {known}Bias and prompt accuracy are read by a classifier that was trained on the labels of \
the same data set and makes mistakes of its own.
"""


def _changes(record: dict[str, Any]) -> list[str]:
    """Return the settings that were given on the command line of a stage."""
    groups = ("--scale.", "--data.", "--evaluation.", "--model.", "--trainer.")
    return [word for word in record.get("command", ()) if word.startswith(groups)]


def _figures(metrics: dict[str, Any]) -> str:
    """Return the rows of figures in the card's table."""
    if metrics["scales"] is None:
        return f"| Bias | not measured: {metrics['reason']} |"
    (figures,) = metrics["scales"].values()
    own, shown = metrics["data"]["bias"]["mean"], figures["bias"]["mean"]
    accuracy, distance = figures["prompt_accuracy"], metrics["frechet_distance"]
    within = "within" if abs(own - shown) <= TOLERANCE else "NOT within"
    return f"""\
| Bias of the training split | {own:.3f} |
| Bias of the samples | {estimate_text(figures["bias"])}, {within} {TOLERANCE} of the \
training split's |
| prompt accuracy of the samples | {100 * accuracy["mean"]:.1f} % |
| Fréchet distance ({distance["extractor"]}, {distance["n"]} samples) to a balanced test set | \
{figures["frechet_distance"]:.2f} |"""
