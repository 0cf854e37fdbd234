"""Which photographs show what: bird cut-outs and scenes of Debian packages."""

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
