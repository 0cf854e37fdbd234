"""Files of a run: written aside and renamed, so that a reader never meets half of one."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from invdiff_pl.errors import InvDiffError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write a file or folder to; rename it on success.

    A folder that already stands at ``target`` is replaced. If the body raises, whatever it had
    written is removed and ``target`` stays as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    _remove(partial)
    try:
        yield partial
        if target.is_dir() and not target.is_symlink():
            retired = target.with_name(f".{target.name}.retired-{os.getpid()}")
            _remove(retired)
            target.rename(retired)
            partial.rename(target)
            _remove(retired)
        else:
            partial.replace(target)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InvDiffError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvDiffError(f"{path} is missing: run the stage that writes it first.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvDiffError(f"{path} is not valid JSON ({error}): delete it and rerun.") from None


def sort_safetensors_header(path: Path) -> None:
    """Rewrite a safetensors file with its header's keys in order.

    The library writes metadata in the order of a hash table, which differs from process to
    process, so that equal contents would give unequal files.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)
    with atomic_path(path) as partial:
        partial.write_bytes(len(ordered).to_bytes(8, "little") + ordered + content[start:])


def digest_bytes(*parts: bytes) -> str:
    """32 hexadecimal digits that depend on every part and on where one part ends."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON-serialisable value, whatever the order of its keys."""
    return digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def digest_file(path: Path) -> str:
    """Digest of one file's content, read in blocks."""
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def digest_folder(folder: Path) -> str:
    """Digest of the names and contents of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest_json([(path.relative_to(folder).as_posix(), digest_file(path)) for path in files])
