"""Files of a run, written aside and renamed, so that a reader never meets half of one."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from invdiff_pl.utils.errors import InvDiffError

# What a killed writer may leave beside its target; never an artefact.
_LEFTOVERS = (".*.partial-*", ".*.retired-*")
DAY = 24 * 3600.0


@contextmanager
def atomic_path(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a path beside ``target`` to write a file or folder to; rename it on success.

    A folder that already stands at ``target`` is replaced. If the body raises, whatever it had
    written is removed and ``target`` stays as it was. The name written to is random: process
    numbers repeat from machine to machine and from container to container.

    Args:
        target: file or folder.
        durable: force the content to disk before the rename, so that not even a power cut leaves
            an empty file under the final name. This is not worth the time for files that are
            checked before they are used again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial = target.with_name(f".{target.name}.partial-{token}")
    try:
        yield partial
        if durable:
            _force_to_disk(partial)
        if target.is_dir() and not target.is_symlink():
            retired = target.with_name(f".{target.name}.retired-{token}")
            target.rename(retired)
            partial.rename(target)
            remove(retired)
        else:
            partial.replace(target)
    finally:
        remove(partial)


def _force_to_disk(path: Path) -> None:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def walk(root: Path, *, follow_links: bool = False) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield folders below a root with the names of folders and files in each, as ``os.walk`` does.

    Args:
        root: folder to start from.
        follow_links: look into linked folders, too; each folder once, wherever links lead.
    """
    seen: set[str] = set()
    for at, folders, files in os.walk(root, followlinks=follow_links):
        if follow_links:
            real = os.path.realpath(at)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
        yield Path(at), folders, files


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove what killed writers left below a folder.

    Args:
        folder: folder whose writers are known to be gone, unless an age is given.
        older_than: least age in seconds; younger ones may belong to a writer still at work.
    """
    limit = time.time() - older_than
    for pattern in _LEFTOVERS:
        for path in list(folder.rglob(pattern)):
            with suppress(FileNotFoundError):  # another process may do the same
                if older_than == 0 or path.stat().st_mtime < limit:
                    remove(path)


def is_leftover(path: Path) -> bool:
    """Return whether a path has a name that killed writers leave behind."""
    return any(path.match(pattern) for pattern in _LEFTOVERS)


def is_file(path: Path) -> bool:
    """Return whether there is such a file; there is none of a name that no system takes."""
    return _is_there(path, Path.is_file)


def is_folder(path: Path) -> bool:
    """Return whether there is such a folder; there is none of a name that no system takes."""
    return _is_there(path, Path.is_dir)


def _is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


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
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise InvDiffError(f"{path} is not valid JSON ({error}): delete it and rerun.") from None
    except OSError as error:
        raise InvDiffError(f"{path} cannot be read ({error.strerror or error}).") from None


def read_object(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Read a JSON object that must have certain keys.

    Args:
        path: path of the file.
        kinds: expected type or types of each key's value.

    Raises:
        InvDiffError: if the file is missing or is not JSON, or a key is missing or of another type.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InvDiffError(f"{path} holds no JSON object: delete it and rerun.")
    for key, kind in kinds.items():
        # JSON's true and false are integers to Python, and to nobody else.
        found = value.get(key)
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
            wanted = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(k.__name__ for k in wanted)
            raise InvDiffError(
                f"{path}: {key} is {_short(found) if key in value else 'missing'}, expected "
                f"{names}: delete the file and rerun."
            )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def sort_safetensors_header(path: Path) -> None:
    """Rewrite a safetensors file with its header's keys in order.

    The library writes metadata in the order of a hash table, which differs from process to
    process, so that files of equal content would differ.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)
    with atomic_path(path) as partial:
        partial.write_bytes(len(ordered).to_bytes(8, "little") + ordered + content[start:])


def digest_bytes(*parts: bytes) -> str:
    """Return 32 hexadecimal digits that depend on every part and on where each part ends."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def digest_json(value: Any) -> str:
    """Compute the digest of a JSON-serialisable value, whatever the order of its keys."""
    return digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def digest_file(path: Path) -> str:
    """Compute the digest of a file's content, read in blocks."""
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def digest_folder(folder: Path, *, documents: bool = True) -> str:
    """Compute the digest of the names and contents of all files below ``folder``.

    Args:
        folder: the folder.
        documents: whether Markdown and hidden files count, which no loader reads.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [(path.relative_to(folder), path) for path in files]
    if not documents:
        named = [(name, path) for name, path in named if not _is_document(name)]
    return digest_json([(name.as_posix(), digest_file(path)) for name, path in named])


def _is_document(name: Path) -> bool:
    return name.suffix.lower() == ".md" or any(part.startswith(".") for part in name.parts)
