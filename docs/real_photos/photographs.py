"""What each photograph shows: cut-outs and scenes from Debian packages, by data set."""

from typing import NamedTuple

STAMP_PACKAGE = "tuxpaint-stamps-default"

# Classes of birds (y) and of scenes (place), by their code.
LABELS = ("land", "water")

# Class, then stamp=species. Left out: albino_peahen (grass in the cut-out), crowned_crane (cranes
# are of neither class).
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

# What the prompts name, and the surface that each kind mostly lies or stands on.
KINDS = ("fruit", "vegetable", "hoofed animal", "furry animal")
SURFACES = ("bare", "plants")
HOMES = ("bare", "bare", "plants", "plants")

# Folder of the stamps, kind, stamps. Left out: drawings, and stamps with ground beneath them.
THINGS = """
food/fruit fruit apple_fuji apple_granny_smith apple_green apple_red apple_sierra_beauty apricot
food/fruit fruit Apricot_whole avocado banana cherimoya Cherry_Stella grapes kiwi lemon mandarine
food/fruit fruit mango orange orange_seville pear pineapple pomegranate raspberry sliced_lime
food/fruit fruit sliced_orange strawberry Strawberry2
food/vegetables vegetable broccoli carrot chilepepper corn eggplant garlic garlics lettuce mushroom
food/vegetables vegetable onion pattypan_squash pepper potato pumpkin_small redlettuce tomato yam
food/vegetables vegetable yellowpepper
bovines hoofed_animal bison bull cow cow_white gnu-baby gnu-baby-stand gnu-stand goat mountaingoat
bovines hoofed_animal ram sheep sheep_lamb yak zebu
camel hoofed_animal camel dromedary
deer hoofed_animal caribou deer doe wapiti
equines hoofed_animal donkey donkey_eating horse zebra
mammals hoofed_animal giraffe
aquatic furry_animal otter
bears furry_animal bear european-bear
cats furry_animal lion-2 tiger
dogs furry_animal dingo dog
mammals furry_animal badger ferret rabbit_little
rodents furry_animal beaver capybara marmot mouse rabbit rabbit-2 rat squirrel
"""

# As SCENES, with the surface in place of the place.
GROUNDS = """
lomiri-wallpapers-16.04 plants backgrounds/Dragonfly_by_Bolly.jpg 0 0 100 100
lomiri-wallpapers-16.04 plants backgrounds/seeding_by_Clements_Engelhardt.jpg 0 0 100 100
lomiri-wallpapers-20.04 bare backgrounds/Kleiber_by_Lukas_Baubkus.jpg 15 0 40 100
lxqt-themes plants lxqt/wallpapers/flowers.png 0 0 100 100
mate-backgrounds bare mate/nature/Wood.jpg 0 0 100 100
mate-backgrounds plants mate/nature/Blinds.jpg 0 0 100 100
mate-backgrounds plants mate/nature/GreenMeadow.jpg 0 0 100 100
mate-backgrounds plants mate/nature/RainDrops.jpg 0 0 100 100
plasma-workspace-wallpapers bare BytheWater/contents/images/2560x1600.jpg 0 50 100 100
plasma-workspace-wallpapers bare ColdRipple/contents/images/2560x1600.jpg 20 60 80 100
plasma-workspace-wallpapers plants OneStandsOut/contents/images/2560x1600.jpg 0 0 100 100
tuxpaint-data bare tuxpaint/templates/burnt_bark.jpg 0 0 100 100
tuxpaint-data bare tuxpaint/templates/cliff.jpg 15 30 85 100
tuxpaint-data bare tuxpaint/templates/lighthouse.jpg 30 62 75 100
tuxpaint-data bare tuxpaint/templates/mudstone.jpg 0 0 100 100
tuxpaint-data bare tuxpaint/templates/rocks.jpg 0 0 100 100
tuxpaint-data bare tuxpaint/templates/wool_mill_machine.jpg 0 0 100 100
tuxpaint-data plants tuxpaint/templates/corn_maze.jpg 0 0 100 100
tuxpaint-data plants tuxpaint/templates/mossy_log.jpg 0 0 100 100
tuxpaint-data plants tuxpaint/templates/redwoods_above.jpg 0 0 100 100
tuxpaint-data plants tuxpaint/templates/sun_behind_leaves.jpg 0 0 100 100
tuxpaint-data plants tuxpaint/templates/trees_above.jpg 0 0 100 100
"""


class Scene(NamedTuple):
    """A row of a table of scenes; ``region`` in hundredths of width and height."""

    package: str
    label: int
    region: tuple[int, int, int, int]


def bird_table() -> dict[str, tuple[int, str]]:
    """Return class and species of each bird, by file name."""
    lines = [line.split() for line in BIRDS.split("\n") if line]
    pairs = [(kind, *bird.split("=")) for kind, *birds in lines for bird in birds]
    return {f"{stamp}.png": (LABELS.index(kind), species) for kind, stamp, species in pairs}


def thing_table() -> dict[str, int]:
    """Return the kind of each thing, by the end of its path."""
    lines = [line.split() for line in THINGS.split("\n") if line]
    return {
        f"{folder}/{stamp}.png": KINDS.index(kind.replace("_", " "))
        for folder, kind, *stamps in lines
        for stamp in stamps
    }


def scene_table(scenes: str, labels: tuple[str, ...]) -> dict[str, Scene]:
    """Return package, class and region of each photograph, by the end of its path."""
    table = {}
    for package, place, key, *edges in (line.split() for line in scenes.split("\n") if line):
        left, top, right, bottom = map(int, edges)
        table[key] = Scene(package, labels.index(place), (left, top, right, bottom))
    return table
