"""The model card of a trained adapter: what it was trained on, what it changes, its limits."""

import json
from inspect import signature
from pathlib import Path
from typing import Any

from invdiff_pl.modules import InvariantAdapter
from invdiff_pl.report.blocks import cell
from invdiff_pl.report.figures import estimate_text
from invdiff_pl.report.metadata import with_metadata
from invdiff_pl.utils.files import read_json
from invdiff_pl.workflow.records import RECORD

_LIMITS = """\
- It evens out what the inference found to be associated with the prompts, in this data and this \
backbone. It mitigates no other biases, and the figures do not carry over to other prompts or data.
- What was found need not be the bias that matters: look at the contact sheets of the \
environments before use.
- Bias 0 means equally many samples of each attribute class, which is not the right target for \
every use.
- Figures rest on a classifier's reading of the samples; its held-out accuracy is given above.
- It inherits the backbone's licence, faults and other limits."""


def adapter_card(run_dir: Path, folder: str) -> str:
    """Compose the card with its metadata from what the run's stages wrote.

    Args:
        run_dir: folder of a finished run.
        folder: name of the folder that the card lies in.

    Raises:
        InvDiffError: if the adapter has not been trained.
    """
    adapter = read_json(run_dir / "adapter" / "adapter" / "adapter.json")
    record = read_json(run_dir / "adapter" / RECORD)
    environments = read_json(run_dir / "environments" / "environments.json")
    metrics_file = run_dir / "samples" / "metrics.json"
    metrics = read_json(metrics_file) if metrics_file.is_file() else None
    config = record["config"]
    # Files hold only what differs from the constructor's defaults.
    defaults = {name: each.default for name, each in signature(InvariantAdapter).parameters.items()}
    training = {**defaults, **config["model"]["init_args"]}
    data = config["data"]["init_args"]
    name = config["experiment"]["name"]
    prompt, call = environments["prompts"][0], _call(run_dir)
    text = f"""\
# InvDiff: {name}

A Stable Diffusion pipeline with an adapter that evens out an attribute which is associated with \
the prompts in the training data and was found without labels \
(InvDiff, [arXiv 2412.08480](https://arxiv.org/abs/2412.08480)).

Run in the folder that holds this one:

```python
from invdiff_pl import InvDiffPipeline

pipe = InvDiffPipeline.from_pretrained({_quoted(folder)})
pipe({_quoted(prompt)}, {call}, invariant_scale=1.0).images[0]
```

`invariant_scale=0` gives the backbone's images. {_stock(adapter["kind"], folder, prompt, call)}

## What it was trained on

| | |
| --- | --- |
| backbone | `{training["backbone"]}` |
| data | {name}: {environments["images"]} images of {len(environments["prompts"])} prompts, \
{data["resolution"]} px |
| environments | {_environments(adapter, environments)} |
| adapter | {adapter["kind"]} {adapter["settings"]}, {adapter["parameters"]:,} parameters, \
{100 * adapter["share"]:.2f} % of the denoiser's |
| objective | `{training["objective"]}`, lambda = {training["lambda_"]} |
| steps | {config["trainer"]["max_steps"]} of {data["batch_size"]} images each |
| seed, revision, hardware | {config["seed_everything"]}, {record["revision"]}, \
{record["hardware"]} |
{_untrained(adapter)}
## Before and after

{_figures(metrics)}

## Limits

{_LIMITS}
"""
    kinds = ("lora",) if adapter["kind"] == "lora" else ()
    return with_metadata(text, training["backbone"], "adapter", *kinds)


def _environments(adapter: dict[str, Any], environments: dict[str, Any]) -> str:
    """Describe where the environments come from."""
    chosen = adapter.get("candidates", [])
    numbers = f"candidate {' and '.join(map(str, chosen))} of " if chosen else ""
    return (
        f"{numbers}the hidden attributes associated with the prompts (features: "
        f"{environments['features']}), found without labels"
    )


def _call(run_dir: Path) -> str:
    """Return the call arguments with which the figures were measured."""
    record = run_dir / "samples" / RECORD
    if not record.is_file():
        return "num_inference_steps=20"
    settings = read_json(record)["config"]["model"]["init_args"]
    return f"num_inference_steps={settings['steps']}, guidance_scale={settings['guidance_scale']}"


def _stock(kind: str, folder: str, prompt: str, call: str) -> str:
    """Explain how diffusers itself loads the folder."""
    lora = f"pipe.load_lora_weights({_quoted(folder + '/adapter')})\n" if kind == "lora" else ""
    what = "backbone and adapter" if lora else "the backbone alone"
    return f"""Stock diffusers loads {what}:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({_quoted(folder)}, safety_checker=None)
{lora}pipe({_quoted(prompt)}, {call}).images[0]
```"""


def _quoted(text: str) -> str:
    """Quote a text as a Python string, which JSON strings are, too."""
    return json.dumps(text, ensure_ascii=False)


def _untrained(adapter: dict[str, Any]) -> str:
    if adapter.get("trained", True):
        return ""
    return f"\n**The adapter is untrained**: {adapter['reason']}.\n"


def _figures(metrics: dict[str, Any] | None) -> str:
    if metrics is None:
        return "Not measured: the samples stage has not run."
    if metrics["scales"] is None:
        return f"Not measured: {metrics['reason']}."
    scales = sorted(metrics["scales"], key=float)
    before, after = (metrics["scales"][scale] for scale in (scales[0], scales[-1]))
    distance, classifier = metrics["frechet_distance"], metrics["classifier"]
    rows = [
        ("", "before", "after"),
        ("---", "---", "---"),
        ("Bias, mean over prompts", *(estimate_text(f["bias"]) for f in (before, after))),
        *(
            (
                f"Bias of “{cell(prompt)}”",
                *(estimate_text(f["bias"]["per_prompt"][prompt], "bias") for f in (before, after)),
            )
            for prompt in after["bias"]["per_prompt"]
        ),
        ("prompt accuracy", *(_percent(f["prompt_accuracy"]) for f in (before, after))),
        (
            f"Fréchet distance ({distance['extractor']}) to a balanced set",
            *(f"{f['frechet_distance']:.2f}" for f in (before, after)),
        ),
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    own = metrics["data"]["bias"]
    return (
        f"{table}\n\nInvariant scales {scales[0]} and {scales[-1]}, "
        f"{metrics['samples_per_prompt']} samples per prompt, 95 % intervals. The training data's "
        f"own Bias is {estimate_text(own)}. The classifier is right on "
        f"{100 * classifier['attribute']:.1f} % (attribute) and {100 * classifier['prompt']:.1f} % "
        "(prompt) of held-out images."
    )


def _percent(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * figure['mean']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
