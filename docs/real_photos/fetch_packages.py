"""Fetch the Debian packages that the scripts here take photographs from, once for all of them.

    python docs/real_photos/fetch_packages.py --output packages

Each package is unpacked into a folder of its name; nothing is installed, and what is there is not
fetched again. Give the folder as ``--folders`` or ``--scenes``, and ``tuxpaint-stamps-default`` in
it as ``--birds``.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from build_digits import PACKAGE
from packages import UserError, fetch
from photographs import GROUNDS, LABELS, SCENES, STAMP_PACKAGE, SURFACES, scene_table


def package_names() -> list[str]:
    """Return the names of all packages, sorted."""
    scenes = scene_table(SCENES, LABELS), scene_table(GROUNDS, SURFACES)
    found = {scene.package for table in scenes for scene in table.values()}
    return sorted({PACKAGE, STAMP_PACKAGE, *found})


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the missing packages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to make or to complete")
    output: Path = parser.parse_args(arguments).output.absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
        # Beside the output, which the other scripts search with all that is in it.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as partial:
            for package in package_names():
                if not (output / package).is_dir():
                    fetch([package], Path(partial))
                    (Path(partial) / package).rename(output / package)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
