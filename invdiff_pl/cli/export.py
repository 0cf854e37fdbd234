"""``export``: a self-contained folder with a run's backbone, adapter and model card."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from invdiff_pl.adapters.base import CONFIG_FILE
from invdiff_pl.adapters.forms import FORMS, Form
from invdiff_pl.adapters.pipeline import ADAPTER_FOLDER, is_local, locate
from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.backbones.assets import resolve_backbone
from invdiff_pl.backbones.folders import make_portable
from invdiff_pl.backbones.pipeline import load_pipeline, save_pipeline
from invdiff_pl.report.adapter_card import adapter_card
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, write_text

FORM_HELP = "kohya: also write a file for ComfyUI and A1111; peft: also one for PeftModel"


def run_export(arguments: Sequence[str]) -> None:
    """Write a run's backbone, adapter and model card into one folder.

    Raises:
        InvDiffError: if the run has no trained adapter, or the output is some other folder.
    """
    parser = argparse.ArgumentParser(prog="python -m invdiff_pl export", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--form", default="diffusers", choices=FORMS, help=FORM_HELP)
    options = parser.parse_args(arguments)
    export(options.run_dir, options.output, options.form)
    print(f"exported to {options.output}: load it with InvDiffPipeline.from_pretrained(...)")


def export(run_dir: Path, output: Path, form: Form = "diffusers") -> None:
    """Write the folder that ``InvDiffPipeline.from_pretrained`` loads.

    It holds the backbone's files, changed so that they load without further arguments; a stock
    ``StableDiffusionPipeline`` loads the backbone from it, and a LoRA adapter from its ``adapter``
    folder.

    Args:
        run_dir: folder of a finished run.
        output: folder to write, replaced if it is an earlier export.
        form: form of a further file of the adapter, see ``TrainedAdapter.save``.

    Raises:
        InvDiffError: if the run has no trained adapter, or none of that form, or the output is some
            other folder.
    """
    if output.exists() and not (output / ADAPTER_FOLDER / CONFIG_FILE).is_file():
        raise InvDiffError(
            f"--output={output} exists and is not an earlier export: remove it or name another "
            "folder."
        )
    backbone, adapter = locate(run_dir)
    card = adapter_card(run_dir, folder=output.absolute().name)
    with atomic_path(output) as partial:
        if is_local(backbone):
            shutil.copytree(
                resolve_backbone(backbone),
                partial,
                ignore=shutil.ignore_patterns("README.md", ".*"),
            )
            make_portable(partial)
        else:
            save_pipeline(load_pipeline(backbone), partial)
        TrainedAdapter(adapter).save(partial / ADAPTER_FOLDER, form)
        write_text(partial / "README.md", card)
