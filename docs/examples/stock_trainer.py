"""For Lightning users: the adapter as a LightningModule, your own loader, a stock Trainer.

    python docs/examples/stock_trainer.py

No run folder, no YAML: a module, a loader and the callbacks you want. It takes less than a minute
on one CPU core.
"""

# %%
import os
import tempfile
from importlib.resources import files
from pathlib import Path

import pytorch_lightning as pl
import torch
from diffusers import StableDiffusionPipeline
from torch.utils.data import DataLoader

import invdiff_pl as inv
from invdiff_pl.callbacks import ExponentialMovingAverage, HeldOutSelection, SaveAdapter
from invdiff_pl.data.synthetic.waterbirds import (
    SPECIES,
    RenderedWaterbirds,
    draw_picture,
    plan_pictures,
)

STEPS = int(os.environ.get("STEPS", "10"))
FRACTION = float(os.environ.get("FRACTION", "0.03"))  # of Waterbirds' 4795 pictures
work = Path(tempfile.mkdtemp(prefix="invdiff-example-"))

# %%
# Pictures, prompts, and which environment each picture is in. Environments may come from
# `inv.discover`, from a clustering of your own or, as here, from a label: on land or on water.
drawn = RenderedWaterbirds(fraction=FRACTION)
planned = [picture for picture in plan_pictures(drawn) if picture.split == 0]
names = [SPECIES[picture.species].name.replace("_", " ").lower() for picture in planned]
images = inv.PromptedImages(
    [draw_picture(picture, drawn) for picture in planned],
    [f"a photo of a {name}" for name in names],
)
environments = torch.tensor([picture.place for picture in planned])

# %%
model = files("invdiff_pl") / "assets" / "waterbirds"
pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)

# %%
# A loader of your own. Batches hold `latents` [B, C, h, w] (or the VAE's `moments`), `prompt`
# (texts, or numbers) and `environment` int64 [B] (or soft `membership` [B, G]).
pixels = images.pixels(range(len(images)), resolution=32).float() / 127.5 - 1
with torch.no_grad():
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
rows = [
    {"latents": latents[n], "prompt": images[n][1], "environment": environments[n]}
    for n in range(len(images))
]
loader = DataLoader(rows, batch_size=12, shuffle=True, drop_last=True)


# %%
# The Trainer is Lightning's own, and so are its precision, devices, strategy and loggers. The
# averaged weights are saved, since `SaveAdapter` comes after the averaging.
def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    """Return a stock Trainer."""
    return pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=work,
        callbacks=list(callbacks),
    )


module = inv.InvariantAdapter(pipe, learning_rate=1e-3, groups=2, adapter_settings={"rank": 4})
trainer(ExponentialMovingAverage(0.9), SaveAdapter(str(work / "own-loader"))).fit(module, loader)
print(inv.TrainedAdapter(work / "own-loader" / "adapter"))

# The module attached a LoRA to the pipeline's denoiser; take it out before the next one.
module.adapter.detach()

# %%
# With `LatentsInMemory` batches are balanced over (prompt, environment), pairs of pictures share
# timestep and noise, and some pictures are held out, whose risks `HeldOutSelection` uses to choose
# among the weights. It encodes the pictures with the pipeline, both as they are and mirrored.
data = inv.LatentsInMemory.from_images(
    pipe, images, environments, batch_size=12, held_out=0.1, progress=False
)
module = inv.InvariantAdapter(pipe, learning_rate=1e-3)
selection = HeldOutSelection(every_n_steps=max(1, STEPS // 2))
trainer(ExponentialMovingAverage(0.9), selection, SaveAdapter(str(work / "in-memory"))).fit(
    module, datamodule=data
)
module.adapter.detach()
for measured in selection.report["selection"]["candidates"]:
    print("held out:", measured)

# %%
# Either folder is a LoRA for `pipe.load_lora_weights`.
pipe.load_lora_weights(work / "in-memory" / "adapter")
pipe.set_progress_bar_config(disable=True)
pipe(images.prompts[0], num_inference_steps=5).images[0].save(work / "picture.png")
print("picture:", work / "picture.png")
