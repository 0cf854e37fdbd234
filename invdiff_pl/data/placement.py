"""Where a cache of latents is held while it is trained on."""

from typing import Literal

import torch

from invdiff_pl.utils.resources import free_memory

LatentDevice = Literal["auto", "device", "memory", "disk"]
# `auto` holds a cache where it takes at most this part of what is free: the rest is for training.
_SHARE = 0.25


def place_for(
    size: int, latent_device: LatentDevice, device: torch.device, processes: int = 1
) -> torch.device | None:
    """Where a cache is held: on the device, in the host's memory, or (``None``) on the disk.

    Args:
        size: of the cache, bytes.
        latent_device: ``device``, ``memory`` or ``disk``; or ``auto``, the first of them where it
            takes at most a quarter of what is free.
        device: that trains.
        processes: of this machine that share its memory, each with a copy.
    """
    host = torch.device("cpu")
    if latent_device != "auto":
        return {"disk": None, "device": device, "memory": host}[latent_device]
    for place, copies in ((device, 1 if device.type == "cuda" else processes), (host, processes)):
        free = free_memory(place)
        if free is not None and size * copies <= _SHARE * free:
            return place
    return None
