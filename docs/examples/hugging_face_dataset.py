"""Pictures of a Hugging Face data set: who goes along with which prompt?

    python docs/examples/hugging_face_dataset.py

`PromptedImages.from_hf` takes any `datasets.Dataset` with a column of images and a column of
prompts; it reads a picture when it is needed, so large data sets stay on disk. This script makes a
small one in memory; `datasets.load_dataset("imagefolder", data_dir=...)` makes one from your files.
"""

# %%
import os
import sys
from importlib.resources import files

import torch
from diffusers import StableDiffusionPipeline

import invdiff_pl as inv
from invdiff_pl.data.synthetic.waterbirds import (
    SPECIES,
    RenderedWaterbirds,
    draw_picture,
    plan_pictures,
)
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings

try:
    from datasets import Dataset
except ImportError:
    sys.exit("This example needs the package datasets: pip install datasets")

FRACTION = float(os.environ.get("FRACTION", "0.06"))  # of Waterbirds' 4795 pictures
STARTS = int(os.environ.get("STARTS", "20"))

# %%
# A data set with the columns `image` and `caption`.
drawn = RenderedWaterbirds(fraction=FRACTION)
planned = [picture for picture in plan_pictures(drawn) if picture.split == 0]
names = [SPECIES[picture.species].name.replace("_", " ").lower() for picture in planned]
dataset = Dataset.from_dict(
    {
        "image": [draw_picture(picture, drawn) for picture in planned],
        "caption": [f"a photo of a {name}" for name in names],
    }
)

# %%
# `prompt` names the column of prompts if it is not `text`, and `image` that of the images.
images = inv.PromptedImages.from_hf(dataset, prompt="caption")
print(len(images), "pictures of", images.prompts)

# %%
# The pipeline's own denoiser sorts the pictures, without knowing where the birds are.
model = files("invdiff_pl") / "assets" / "waterbirds"
pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
settings = HiddenAttributeSettings(starts=STARTS, values=())
found = inv.discover(pipe, images, settings=settings, progress=False)
print(found)

# %%
# Here we happen to know it: which share of each group is on water? (`place` is 1 there.)
groups = found[0].memberships.argmax(1)
on_water = torch.tensor([float(picture.place) for picture in planned])
for group in range(found[0].memberships.shape[1]):
    members = groups == group
    print(f"group {group}: {int(members.sum())} pictures, {on_water[members].mean():.0%} on water")

# %%
# The results can be added to the data set as columns.
columns = {"group": groups.tolist(), "conflict": found[0].conflict.tolist()}
for name, values in columns.items():
    dataset = dataset.add_column(name, values)
print(dataset.column_names)
