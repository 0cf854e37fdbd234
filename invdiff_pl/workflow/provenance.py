"""How a result came about: code revision, library versions, machine."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from invdiff_pl import __version__

_PACKAGES = ("torch", "pytorch-lightning", "diffusers", "transformers", "peft", "torchmetrics")


def provenance() -> dict[str, Any]:
    """Collect time, revision, versions and hardware, JSON-ready."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "versions": {"invdiff-pl": __version__, **{n: _version(n) for n in _PACKAGES}},
        "hardware": _hardware(),
    }


def _revision() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> str:
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text().splitlines() if "model name" in line]
        if names:
            model = f"{len(names)} × {names[0].split(':', 1)[1].strip()}"
    return model
