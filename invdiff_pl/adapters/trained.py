"""A trained adapter, kept in files."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from invdiff_pl.adapters.base import CONFIG_FILE
from invdiff_pl.adapters.forms import FORMS, Form, write_form
from invdiff_pl.adapters.lora import WEIGHTS_FILE
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, is_file, read_object
from invdiff_pl.utils.names import require_name


class TrainedAdapter:
    """A trained adapter: the result of :func:`invdiff_pl.debias`, or the folder of a saved one.

    The default kind is a LoRA, whose folder stock diffusers loads with ``load_lora_weights``.

    Args:
        folder: folder of the adapter's files.
        reports: what callbacks measured during training, by name.
        keep: keeps a temporary folder for as long as this object lives.

    Raises:
        ValueError: if the folder holds no adapter.

    Example:
        >>> from invdiff_pl.adapters import build_adapter
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> adapter = build_adapter("lora", tiny_pipeline(["a photo of a nurse"]).unet)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapter.save(Path(folder) / "even-nurses")
        ...     TrainedAdapter(Path(folder) / "even-nurses")
        TrainedAdapter(lora, 12960 parameters, trained)
    """

    def __init__(
        self,
        folder: str | Path,
        reports: dict[str, Any] | None = None,
        keep: "tempfile.TemporaryDirectory[str] | None" = None,
    ) -> None:
        self.folder = Path(folder)
        if not is_file(self.folder / CONFIG_FILE):
            raise InvDiffError(f"{self.folder} holds no adapter: there is no {CONFIG_FILE} in it.")
        self.facts = read_object(self.folder / CONFIG_FILE, kind=str, settings=dict)
        self.reports = reports or {}
        self._keep = keep

    @property
    def kind(self) -> str:
        """Kind of adapter, such as ``lora``."""
        return str(self.facts["kind"])

    @property
    def trained(self) -> bool:
        """Whether anything was trained; if not, the adapter changes nothing."""
        return bool(self.facts.get("trained", True))

    def save(self, folder: str | Path, form: Form = "diffusers") -> Path:
        """Write the adapter into a folder, which must be empty or not exist yet.

        Args:
            folder: folder to write to; stock diffusers pipelines load a LoRA from it.
            form: which further file to write: ``kohya`` for ComfyUI and A1111, ``peft`` for
                ``PeftModel.from_pretrained``; none with ``diffusers``.

        Returns:
            the folder.

        Raises:
            ValueError: if the folder is not empty, or this adapter has no such form.
        """
        require_name("form", form, FORMS)
        if form != "diffusers" and self.kind != "lora":
            raise InvDiffError(f"form={form!r}: a {self.kind} is not a LoRA; expected diffusers.")
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise InvDiffError(f"folder={str(target)!r} is not empty: give a new one.")
        with atomic_path(target) as partial:
            shutil.copytree(self.folder, partial, dirs_exist_ok=True)
            if form != "diffusers":
                architecture = str(self.facts.get("architecture", "unknown"))
                write_form(partial / WEIGHTS_FILE, form, partial, architecture)
        return target

    def __repr__(self) -> str:
        state = "trained" if self.trained else "not trained, a no-op"
        return f"TrainedAdapter({self.kind}, {self.facts.get('parameters')} parameters, {state})"
