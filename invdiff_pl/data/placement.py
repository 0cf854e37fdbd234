"""Where a cache of latents is held during training."""

from typing import Literal

import torch

from invdiff_pl.utils.resources import free_memory

LatentDevice = Literal["auto", "device", "memory", "disk"]
# `auto` holds a cache where it takes at most this share of free memory: the rest is for training.
_SHARE = 0.25


def place_for(
    size: int, latent_device: LatentDevice, device: torch.device, processes: int = 1
) -> torch.device | None:
    """Choose where to hold a cache: on the device, in the host's memory, or (``None``) on disk.

    Args:
        size: size of the cache in bytes.
        latent_device: ``device``, ``memory`` or ``disk``; or ``auto``, the first of them where the
            cache takes at most a quarter of what is free.
        device: device that trains.
        processes: number of processes that share this machine's memory, each with a copy.
    """
    host = torch.device("cpu")
    if latent_device != "auto":
        return {"disk": None, "device": device, "memory": host}[latent_device]
    for place, copies in ((device, 1 if device.type == "cuda" else processes), (host, processes)):
        free = free_memory(place)
        if free is not None and size * copies <= _SHARE * free:
            return place
    return None
