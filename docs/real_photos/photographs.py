"""Which photographs show what: bird cut-outs and scenes of Debian packages, and how to get them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LABELS = ("land", "water")  # of birds (y) and of scenes (place), by their code
BIRD_PACKAGE = "tuxpaint-stamps-default"

# Class, then stamp=species. Left out: albino_peahen (grass in the cut-out), crowned_crane (a crane
# is of neither class).
BIRDS = """
land  adelaide-rosella=Adelaide_rosella blackbird=Blackbird chicken_profile=Chicken crow=Crow
land  cuckoo=Cuckoo guineafowl=Guineafowl helmeted_guineafowl=Guineafowl hen=Chicken
land  lark=Horned_lark magpie=Australian_magpie nandou=Rhea ostrich=Ostrich owl=Snowy_owl
land  peacock=Peacock pigeon=Pigeon quetzal=Quetzal rainbow-lorikeet=Rainbow_lorikeet
land  rooster=Rooster tucan=Toucan turkey=Turkey vulture=Griffon_vulture
water drake=Domestic_duck duck=Mallard gander=Domestic_goose heron_greatblue=Great_blue_heron
water heron_greatblue_flying=Great_blue_heron little-penguin=Little_penguin
water magellanic_penguin=Magellanic_penguin pelican=White_pelican penguin=King_penguin
water pink_flamingo=Flamingo seagull=Herring_gull silver-gull=Silver_gull
"""

# Package, place, end of the photograph's path, and the part of it that shows the place: left, top,
# right and bottom edge in hundredths of its width and height, from the top left corner.
SCENES = """
lomiri-wallpapers-16.04 land backgrounds/Dragonfly_by_Bolly.jpg 0 0 100 100
lomiri-wallpapers-16.04 land backgrounds/aitzgorri_by_Aitzol_Berasategi.jpg 0 30 100 100
lomiri-wallpapers-16.04 land backgrounds/picosdeeuropa_by_Aitzol_Berasategi.jpg 0 20 100 100
lomiri-wallpapers-16.04 land backgrounds/seeding_by_Clements_Engelhardt.jpg 0 0 100 100
lomiri-wallpapers-16.04 water backgrounds/life_by_Aitzol_Berasategi.jpg 40 40 65 100
lxqt-themes land lxqt/wallpapers/flowers.png 0 0 100 100
lxqt-themes land lxqt/wallpapers/fog.jpg 0 40 100 100
lxqt-themes land lxqt/wallpapers/this-is-not-windows.jpg 0 40 100 100
mate-backgrounds land mate/nature/Dune.jpg 0 50 100 100
mate-backgrounds land mate/nature/GreenMeadow.jpg 0 0 100 100
mate-backgrounds water mate/nature/Aqua.jpg 35 15 100 100
plasma-workspace-wallpapers land FallenLeaf/contents/images/2560x1600.jpg 0 0 100 100
plasma-workspace-wallpapers land OneStandsOut/contents/images/2560x1600.jpg 0 0 100 100
plasma-workspace-wallpapers land Path/contents/images/2560x1600.jpg 0 0 100 100
plasma-workspace-wallpapers water BytheWater/contents/images/2560x1600.jpg 0 10 100 45
plasma-workspace-wallpapers water DarkestHour/contents/images/2560x1600.jpg 0 40 100 100
plasma-workspace-wallpapers water EveningGlow/contents/images/2560x1600.jpg 0 20 100 60
plasma-workspace-wallpapers water summer_1am/contents/images/2560x1600.jpg 0 40 100 100
sddm-theme-maldives water themes/maldives/background.jpg 28 60 80 85
tuxpaint-data land tuxpaint/templates/cliff.jpg 0 25 100 100
tuxpaint-data land tuxpaint/templates/corn_maze.jpg 0 0 100 100
tuxpaint-data land tuxpaint/templates/mossy_log.jpg 0 0 100 100
tuxpaint-data land tuxpaint/templates/redwoods_above.jpg 0 0 100 100
tuxpaint-data land tuxpaint/templates/sheep.jpg 0 40 100 100
tuxpaint-data land tuxpaint/templates/sun_behind_leaves.jpg 0 0 100 100
tuxpaint-data water tuxpaint/starters/reef-back.png 0 0 100 100
tuxpaint-data water tuxpaint/templates/jellyfish.jpg 12 0 80 100
tuxpaint-data water tuxpaint/templates/ocean_splash.jpg 0 0 100 100
tuxpaint-data water tuxpaint/templates/ocean_waves.jpg 0 0 100 100
"""


class UserError(Exception):
    """What the user can mend, in one sentence."""


class Source(NamedTuple):
    """A photograph: the name it has in the tables, its class and where it lies."""

    key: str
    label: int
    path: Path


class Scene(NamedTuple):
    """A row of the table of scenes; ``region`` in hundredths of width and height."""

    package: str
    label: int
    region: tuple[int, int, int, int]


def bird_table() -> dict[str, tuple[int, str]]:
    """Class and species of each stamp, by file name."""
    lines = [line.split() for line in BIRDS.split("\n") if line]
    pairs = [(kind, *bird.split("=")) for kind, *birds in lines for bird in birds]
    return {f"{stamp}.png": (LABELS.index(kind), species) for kind, stamp, species in pairs}


def scene_table() -> dict[str, Scene]:
    """Package, class and region of each photograph, by the end of its path."""
    table = {}
    for package, place, key, *edges in (line.split() for line in SCENES.split("\n") if line):
        left, top, right, bottom = map(int, edges)
        table[key] = Scene(package, LABELS.index(place), (left, top, right, bottom))
    return table


def find_sources(labels: dict[str, int], folders: Sequence[Path], flag: str) -> list[Source]:
    """The photographs of a table that lie anywhere under ``folders``, by name."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{flag} {folder} is not a folder: name one that is, or use --fetch.")
    files = sorted(path.as_posix() for folder in folders for path in folder.resolve().rglob("*.*"))
    found = {key: path for key in labels for path in files if path.endswith(f"/{key}")}
    sources = [Source(key, labels[key], Path(found[key])) for key in sorted(found)]
    for label, name in enumerate(LABELS):
        if not any(source.label == label for source in sources):
            raise UserError(
                f"{flag} holds none of the {name} photographs that this script knows: add the "
                "folders of the packages it lists, or use --fetch."
            )
    if missing := sorted(labels.keys() - found.keys()):
        print(f"not found under {flag}, left out: {', '.join(missing)}", file=sys.stderr)
    return sources


def fetch(folder: Path) -> None:
    """Download the Debian packages and unpack them into ``folder``; nothing is installed."""
    for package in (BIRD_PACKAGE, *sorted({scene.package for scene in scene_table().values()})):
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
            f"--fetch needs {command[0]}, which is not here: use it on Debian, or unpack the "
            "packages elsewhere and name them with --birds and --scenes."
        ) from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())
        raise UserError(
            f"'{' '.join(command)}' failed ({reason}): `apt-get update` may help."
        ) from None
