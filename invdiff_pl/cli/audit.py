"""``audit``: what a pipeline draws for prompts, with and without LoRAs."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from invdiff_pl.adapters.stack import lora_file
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import (
    load_pipeline,
    scheduler_class,
    set_scheduler,
)
from invdiff_pl.data.prompt_lists import read_prompts, shipped
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.locks import run_lock
from invdiff_pl.workflow.audit import audit
from invdiff_pl.workflow.audit_inputs import check_readers, make_readers, parse_targets
from invdiff_pl.workflow.audit_result import PAGE

_FLAGS = {
    "prompts": "--prompts",
    "per_prompt": "--per-prompt",
    "lora": "--lora",
    "scheduler": "--scheduler",
}


def run_audit(arguments: Sequence[str]) -> None:
    """Draw samples, count what readers see, and write the table, figures and page.

    Raises:
        InvDiffError: if an input cannot be used.
    """
    options = _parser().parse_args(arguments)
    try:
        _run(options, arguments)
    except InvDiffError as error:
        raise error.in_flags(_FLAGS) from None


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    prompts = read_prompts(options.prompts)
    for file in options.lora:
        lora_file(file)
    if options.scheduler:
        scheduler_class(options.scheduler)
    targets = parse_targets(options.target)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    readers = make_readers(options.classifier, options.clip, options.vqa, device)
    pipe = load_pipeline(options.backbone, options.dtype)
    set_scheduler(pipe, options.scheduler)
    if options.labelled:
        readers = check_readers(readers, options.labelled, frozen_denoiser(pipe).resolution)
    output: Path = options.output
    with run_lock(output, shlex.join(["audit", *arguments])):
        found = audit(
            pipe.to(device),
            prompts,
            readers=readers,
            lora=options.lora,
            per_prompt=options.per_prompt,
            steps=options.steps,
            guidance_scale=options.guidance_scales,
            batch_size=options.batch_size,
            seed=options.seeds,
            target=targets,
            folder=output,
        )
        found = replace(found, settings={"backbone": options.backbone, **found.settings})
        found.save(output)
    for note in found.notes:
        print(note)
    for attribute, when, scale in found.tables():
        bias = found.measures(attribute, when, scale)["bias"]
        low, high = bias["mean_interval"].tolist()
        told = f"Bias {float(bias['mean']):.3f} [{low:.3f}, {high:.3f}]"
        print(f"{attribute}, {when}, guidance scale {scale:g}: {told}")
    print(f"table, figures and page: {output / PAGE}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m invdiff_pl audit",
        description="Draw samples of prompts, with and without LoRAs, and count what "
        "readers see in them; without a reader, count inferred environments. An interrupted audit "
        "keeps its finished sets of samples and resumes.",
        allow_abbrev=False,
    )
    parser.add_argument("--backbone", required=True, help="pipeline folder, hub id or asset:NAME")
    parser.add_argument(
        "--prompts",
        required=True,
        help=f'{", ".join(shipped())}; a file with one prompt per line; or "a; b"',
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE",
        help="safetensors file, folder or run folder; repeat for LoRAs that are active together",
    )
    readers = parser.add_argument_group("readers (each flag may be repeated)")
    readers.add_argument(
        "--classifier",
        action="append",
        nargs="+",
        default=[],
        metavar=("FOLDER", "ATTRIBUTE"),
        help="a run's, or an image classifier of transformers; then the attribute's name, or "
        '"age: young=0-2,3-9; old=more than 70"',
    )
    readers.add_argument(
        "--clip",
        action="append",
        nargs=2,
        default=[],
        metavar=("FOLDER", "PHRASES"),
        help='a phrase for each class, such as "gender: a photo of a man; a photo of a woman"',
    )
    readers.add_argument(
        "--vqa",
        action="append",
        nargs=3,
        default=[],
        metavar=("FOLDER", "ANSWERS", "QUESTION"),
        help='answers and question, such as "gender: man; woman" "Is this a man or a woman?"',
    )
    readers.add_argument(
        "--labelled",
        metavar="TABLE",
        help="CSV of labelled pictures: the column file, and one named after each attribute; Bias "
        "is also given corrected for the readers' errors on them",
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="SHARES",
        help='target shares, such as "gender: 0.3; 0.7"; even by default',
    )
    parser.add_argument(
        "--per-prompt", type=int, default=64, metavar="N", help="samples (default: 64)"
    )
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[7.5], metavar="W")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="denoising steps (default: 50)"
    )
    parser.add_argument("--scheduler", help="class of diffusers (default: the pipeline's own)")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="samples drawn together (default: 8)"
    )
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/audit"),
        metavar="FOLDER",
        help="default: runs/audit",
    )
    return parser
