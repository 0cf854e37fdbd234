"""Your own pipeline and folder of pictures: find a hidden bias, train it away, draw.

Run it from top to bottom, or cell by cell in an editor that knows `# %%`:

    python docs/examples/own_pipeline_and_folder.py [FOLDER]

FOLDER holds pictures in any layout that `PromptedImages.from_folder` reads; without one the script
draws a few birds. It takes less than a minute on one CPU core, far too little to learn much: a real
run has thousands of pictures and steps.
"""

# %%
# Sizes, small here, which environment variables may set.
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

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

STEPS = int(os.environ.get("STEPS", "20"))
FRACTION = float(os.environ.get("FRACTION", "0.06"))  # of Waterbirds' 4795 pictures
STARTS = int(os.environ.get("STARTS", "20"))
work = Path(tempfile.mkdtemp(prefix="invdiff-example-"))

# %%
# Any Stable Diffusion 1.x or 2.x pipeline will do, on CPU or GPU. This one is small and ships with
# the package.
MODEL = files("invdiff_pl") / "assets" / "waterbirds"
pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
pipe.set_progress_bar_config(disable=True)


# %%
# The pictures: here one folder per species, from whose name the prompt is made. 95 % of the
# landbirds are on land, and 95 % of the waterbirds on water; no name says where a bird is.
def draw_birds(folder: Path) -> Path:
    """Draw the training pictures of Waterbirds, in one folder per species."""
    settings = RenderedWaterbirds(fraction=FRACTION)
    for picture in plan_pictures(settings):
        species = SPECIES[picture.species].name.replace("_", " ").lower()
        file = folder / species / f"{picture.number}.png"
        if picture.split == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_picture(picture, settings).save(file)
    return folder


folder = Path(sys.argv[1]) if len(sys.argv) > 1 else draw_birds(work / "birds")
images = inv.PromptedImages.from_folder(folder)
print(len(images), "pictures of", images.prompts)

# %%
# What goes along with the prompts, but is named by none? Candidates come best first. (Without
# `settings` more starting points are tried, which takes a little longer.)
settings = HiddenAttributeSettings(starts=STARTS, values=())
found = inv.discover(pipe, images, settings=settings)
print(found)
print(found.to_pandas().head(len(images.prompts)).to_string())

# %%
# Look at what a candidate is about: the most typical pictures of each group, one row per group. It
# is for you to decide which one to act on.
candidate = found[0]
candidate.sheet(0).save(work / "sheet.png")
print(candidate.to_pandas().sort_values("conflict", ascending=False).head())
print("contact sheet:", work / "sheet.png")

# %%
# Train a LoRA with which the groups of each prompt are drawn evenly. `pipe` stays as it was.
# (A rate this high shows an effect within a few steps; the default is made for 400. With so few
# pictures none are held out, by which a checkpoint would be chosen.)
lora = inv.debias(
    pipe,
    images,
    candidate,
    steps=STEPS,
    batch_size=24,
    learning_rate=1e-2,
    warmup_steps=1,
    held_out=0.0,
    calibration_samples=0,
    progress=False,
)
saved = lora.save(work / "even-birds")
print(lora, "in", saved)

# %%
# Draw with it. A scale of 0 gives the pipeline's own pictures, bit for bit.
even = inv.InvDiffPipeline.from_pipe(pipe, lora)
even.set_progress_bar_config(disable=True)


def draw(pipeline: StableDiffusionPipeline, **scale: float) -> torch.Tensor:
    """Four pictures ``[4, 3, H, W]`` in [0, 1], always from the same noise."""
    return pipeline(
        images.prompts[0],
        num_images_per_prompt=4,
        num_inference_steps=10,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **scale,
    ).images


before, after = draw(even, invariant_scale=0.0), draw(even)
print(f"mean change of a pixel: {float((after - before).abs().mean()):.4f}")

# %%
# It is a plain LoRA: whoever has diffusers and the folder needs nothing from this package.
stock = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
stock.set_progress_bar_config(disable=True)
stock.load_lora_weights(saved)
print("stock diffusers draws the same:", torch.allclose(draw(stock), after, atol=1e-3))

# %%
# The two rows side by side.
pictures = inv.PromptedImages(torch.cat([before, after]), images.prompts[0])
for row, (picture, _) in enumerate(pictures):
    picture.save(work / f"{'before' if row < 4 else 'after'}-{row % 4}.png")
print("pictures:", work)
