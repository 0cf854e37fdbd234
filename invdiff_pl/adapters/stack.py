"""Putting any LoRAs into a pipeline for a while, one or several at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from invdiff_pl.adapters.lora import WEIGHTS_FILE, activate_adapters, active_adapters
from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file, is_folder

SAFE = ".safetensors"
Without = Callable[[], AbstractContextManager[None]]


def lora_file(source: TrainedAdapter | str | Path) -> Path:
    """Find the safetensors file of a LoRA.

    Args:
        source: the file; a folder that holds one; a run folder; or a trained adapter.

    Raises:
        InvDiffError: if there is no such file, or it is not a safetensors file.
    """
    path = Path(source.folder if isinstance(source, TrainedAdapter) else source)
    if is_folder(path / "adapter" / "adapter"):  # of a run
        path = path / "adapter" / "adapter"
    if is_folder(path):
        files = sorted(each for each in path.iterdir() if each.suffix == SAFE)
        named = [each for each in files if each.name == WEIGHTS_FILE] or files
        if len(named) == 1:
            return named[0]
        found = ", ".join(sorted(each.name for each in path.iterdir())[:5]) or "nothing"
        raise InvDiffError(
            f"lora={str(path)!r}: expected one {SAFE} file in it, found {found}.", "lora"
        )
    if not is_file(path):
        raise InvDiffError(f"lora={str(path)!r}: there is no such file or folder.", "lora")
    if path.suffix != SAFE:
        raise InvDiffError(
            f"lora={str(path)!r}: expected a {SAFE} file; others are pickles, which may run code "
            "when they are read. Ask for one, or convert it where you trust it.",
            "lora",
        )
    return path


@contextmanager
def carrying(
    pipe: DiffusionPipeline, loras: Sequence[TrainedAdapter | str | Path]
) -> Iterator[Without]:
    """Add LoRAs to those that a pipeline has, and remove them afterwards.

    Args:
        pipe: a loaded pipeline.
        loras: LoRAs, all of them active, each at its full strength.

    Yields:
        a function that makes a context in which they are not active.

    Raises:
        InvDiffError: naming the first LoRA that cannot be read or does not fit.
    """
    files = [lora_file(lora) for lora in loras]
    if files and not hasattr(pipe, "load_lora_weights"):
        raise InvDiffError(
            f"lora={str(files[0])!r}: a {type(pipe).__name__} loads no LoRAs; put it into the "
            "pipeline with InvDiffPipeline.from_pipe(pipe, lora) or peft, and audit that.",
            "lora",
        )
    denoiser = frozen_denoiser(pipe)
    networks: list[nn.Module] = [denoiser.network, *denoiser.other_networks]
    before = [active_adapters(network) for network in networks]
    had_some = any(before)
    names = [f"audited-{number}" for number in range(len(files))]
    try:
        for file, name in zip(files, names, strict=True):
            _load(pipe, file, name)
        _activate(networks, before, names)

        @contextmanager
        def without() -> Iterator[None]:
            _activate(networks, before, [])
            try:
                yield
            finally:
                _activate(networks, before, names)

        yield without
    finally:
        if had_some:
            pipe.delete_adapters([name for name in names if name in _loaded(pipe)])
        elif names:
            pipe.unload_lora_weights()
        for network, active in zip(networks, before, strict=True):
            if active:
                activate_adapters(network, active)


def _load(pipe: DiffusionPipeline, file: Path, name: str) -> None:
    try:
        pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True
        )
    except Exception as error:  # with another architecture's LoRA, anything may be raised
        told = [line for line in str(error).splitlines() if line.strip()]
        reason = " ".join(" ".join(told[:2]).split())[:300] or type(error).__name__
        raise InvDiffError(
            f"lora={str(file)!r} does not fit the pipeline: {reason}", "lora"
        ) from None
    if name not in _loaded(pipe):
        raise InvDiffError(
            f"lora={str(file)!r} does not fit the pipeline: none of its layers is in the "
            "pipeline's networks; it was made for another architecture.",
            "lora",
        )


def _loaded(pipe: DiffusionPipeline) -> set[str]:
    return {name for names in pipe.get_list_adapters().values() for name in names}


def _activate(
    networks: Sequence[nn.Module], before: Sequence[list[str]], names: Sequence[str]
) -> None:
    """Activate the LoRAs that were active before and, of ``names``, those that a network has."""
    for network, active in zip(networks, before, strict=True):
        own = [name for name in names if name in getattr(network, "peft_config", {})]
        activate_adapters(network, [*active, *own])
