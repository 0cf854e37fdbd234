"""Ways to damage a file: at random, or within its structure so that the damage gets deeper."""

import io
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

NASTY_TEXT = (
    "", " ", "\0", "\ufeff", "\r\n", "\n", '"', "'", ",", "\t", "nan", "-1", "1e400", "0x10",
    "99999999999999999999", "3.5", "true", "null", "../../etc/passwd", "/etc/passwd", "C:\\x",
    "a\\b", "!!python/object/apply:os.system ['true']", "!!binary x", "${oc.env:NOT_THERE}",
    "${a.b.c}", "${", "&a *a", "[" * 3000, "{" * 3000, '{"a":' * 2000, "x" * 5000,
    "\u202e\u0000\ud7ff", "鳥", "%s", "<script>alert(1)</script>", "=1+1", "# x", "---", "- ",
    ": ", "|", ">", "?", "@", "`", "\x1b[2J", "NaN",
)  # fmt: skip
_SPECIAL_BYTES = (b"\x00", b"\xff", b"\xfe\xff", b"\xc3", b"\xed\xa0\x80", b"\x80", b"\r", b"\x1a")
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "0", [], {}, [[]], [0], [None], {"x": 1}, "../x", "\0",
    "y" * 300, [1] * 50,
)  # fmt: skip

Mutation = Callable[[bytes, random.Random], bytes]


def at_random(content: bytes, source: random.Random) -> bytes:
    """Flip, cut, double, insert or exchange bytes."""
    changed = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 4, 16))):
        at = source.randrange(len(changed) + 1)
        end = min(len(changed), at + int(2 ** source.uniform(0, 8)))
        how = source.randrange(7)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << source.randrange(8)
        elif how == 1:
            del changed[at:end]
        elif how == 2:
            changed[at:at] = changed[at:end]
        elif how == 3:
            changed[at:at] = source.choice(_SPECIAL_BYTES)
        elif how == 4:
            changed[at:end] = source.randbytes(end - at)
        elif how == 5:
            changed[at:at] = source.choice(NASTY_TEXT).encode("utf-8", "surrogatepass")
        elif source.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def in_lines(content: bytes, source: random.Random) -> bytes:
    """Exchange a cell or a line of a table."""
    lines = content.split(b"\n")
    row = source.randrange(len(lines))
    how = source.randrange(5)
    if how == 0:
        lines.insert(row, lines[source.randrange(len(lines))])
    elif how == 1:
        del lines[row]
    else:
        separator = source.choice((b",", b"\t", b" "))
        cells = lines[row].split(separator)
        nasty = source.choice(NASTY_TEXT).encode("utf-8", "surrogatepass")
        cells[source.randrange(len(cells))] = nasty
        if how == 3:
            cells.append(nasty)
        lines[row] = separator.join(cells)
    return b"\n".join(lines)


def _change_tree(tree: Any, source: random.Random) -> Any:
    """A JSON-like value with one node exchanged, renamed or removed."""
    if isinstance(tree, dict) and tree and source.random() < 0.85:
        key = source.choice(sorted(tree, key=str))
        how = source.random()
        changed = dict(tree)
        if how < 0.1:
            del changed[key]
        elif how < 0.2:
            changed[source.choice(NASTY_TEXT)[:50]] = changed.pop(key)
        else:
            changed[key] = _change_tree(tree[key], source)
        return changed
    if isinstance(tree, list) and tree and source.random() < 0.85:
        place = source.randrange(len(tree))
        if source.random() < 0.15:
            return tree[:place] + tree[place + 1 :]
        return [*tree[:place], _change_tree(tree[place], source), *tree[place + 1 :]]
    return source.choice((*_VALUES, source.choice(NASTY_TEXT)[:200]))


def in_json(content: bytes, source: random.Random) -> bytes:
    """Exchange a value or a key of a JSON file."""
    return json.dumps(_change_tree(json.loads(content), source)).encode()


def in_json_lines(content: bytes, source: random.Random) -> bytes:
    """Exchange a value or a key of one line."""
    lines = content.splitlines()
    row = source.randrange(len(lines))
    lines[row] = in_json(lines[row], source)
    return b"\n".join(lines) + b"\n"


def in_yaml(content: bytes, source: random.Random) -> bytes:
    """Exchange a value or a key of a YAML file."""
    stream = io.StringIO()
    yaml.safe_dump(_change_tree(yaml.safe_load(content), source), stream)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def in_safetensors(content: bytes, source: random.Random) -> bytes:
    """Exchange a value of a safetensors file's header, which stays well-formed."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(_change_tree(json.loads(content[8:start]), source)).encode()
    return len(header).to_bytes(8, "little") + header + content[start:]
