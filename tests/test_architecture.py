"""The rooms of the package, and which way imports point."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import invdiff_pl

PACKAGE = Path(invdiff_pl.__file__).parent
# Rooms on one floor may import each other; none imports from a floor above.
FLOORS = (
    ("utils",),
    ("backbones",),
    ("data",),
    ("adapters", "objectives", "environments", "metrics"),
    ("modules",),
    ("callbacks",),
    ("report", "workflow"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _imported_rooms(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "invdiff_pl":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("invdiff_pl."):
            yield str(node.module).split(".")[1]


def test_the_package_has_the_rooms_that_are_documented() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(FLOOR)
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert all(f"| `{room}/` |" in text for room in rooms)


@pytest.mark.parametrize("room", list(FLOOR))
def test_imports_point_down(room: str) -> None:
    upward = [
        f"{file.relative_to(PACKAGE)} imports {other}"
        for file in (PACKAGE / room).rglob("*.py")
        for other in _imported_rooms(file)
        if FLOOR.get(other, 0) > FLOOR[room]
    ]
    assert not upward


@pytest.mark.parametrize("room", ["backbones", "environments", "objectives", "adapters"])
def test_algorithms_know_nothing_of_lightning(room: str) -> None:
    files = (PACKAGE / room).rglob("*.py")
    assert not [file.name for file in files if "pytorch_lightning" in file.read_text("utf-8")]
