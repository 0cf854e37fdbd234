"""Photographs from Debian packages: fetching the packages, and finding files in them."""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class UserError(Exception):
    """An error that the user can mend, with a message of one sentence."""


class Source(NamedTuple):
    """A photograph: its name in the tables, its class and its path."""

    key: str
    label: int
    path: Path


def find_sources(
    labels: dict[str, int], names: Sequence[str], folders: Sequence[Path], flag: str
) -> list[Source]:
    """Find the photographs of a table anywhere under ``folders``, sorted by name.

    Args:
        labels: class of each photograph, by the end of its path.
        names: names of the classes; there must be a photograph of each.
        folders: folders to search, with all that is below them.
        flag: flag that named them.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{flag} {folder} is not a folder: name one that is, or use --fetch.")
    files = sorted(path.as_posix() for folder in folders for path in folder.resolve().rglob("*.*"))
    found = {key: path for key in labels for path in files if path.endswith(f"/{key}")}
    sources = [Source(key, labels[key], Path(found[key])) for key in sorted(found)]
    for label, name in enumerate(names):
        if not any(source.label == label for source in sources):
            raise UserError(
                f"{flag} holds none of the {name} photographs that this script knows: add the "
                "folders of the packages it lists, or use --fetch."
            )
    if missing := sorted(labels.keys() - found.keys()):
        print(f"not found under {flag}, left out: {', '.join(missing)}", file=sys.stderr)
    return sources


def fetch(packages: Iterable[str], folder: Path) -> None:
    """Download Debian packages and unpack each into a folder of its name; nothing is installed."""
    for package in packages:
        print(f"fetching {package}", file=sys.stderr)
        unsandboxed = ["-o", "APT::Sandbox::User=root"]  # or apt warns when root runs this
        _run(["apt-get", *unsandboxed, "-qq", "download", package], folder)
        for archive in folder.glob("*.deb"):
            _run(["dpkg", "-x", archive.name, package], folder)
            archive.unlink()


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"fetching packages needs {command[0]}, which is not here: do it on Debian, or unpack "
            "the packages elsewhere and name their folders."
        ) from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())
        raise UserError(
            f"'{' '.join(command)}' failed ({reason}): `apt-get update` may help."
        ) from None
