"""Scenes of land and water, drawn with texture and varied colour."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LAND, WATER = 0, 1
Pixels = NDArray[np.float32]


def draw_scene(place: int, size: int, source: np.random.Generator) -> Pixels:
    """Draw a scene without a bird.

    Args:
        place: 0 land, 1 water.
        size: side in pixels.
        source: source of all variation.

    Returns:
        float32 ``[size, size, 3]`` in [0, 255].
    """
    ground = _water(size, source) if place == WATER else _land(size, source)
    horizon = int(size * source.uniform(0.05, 0.4)) if source.random() < 0.8 else 0
    if horizon:
        ground[:horizon] = _sky(size, source)[:horizon]
        if place == LAND:
            _treeline(ground, horizon, source)
    shade = 1 + source.uniform(-0.18, 0.18) + 0.08 * smooth_noise(size, 3, source)
    return np.clip(ground * shade[..., None], 0, 255).astype(np.float32)


def smooth_noise(
    size: int, cells: int | tuple[int, int], source: np.random.Generator
) -> NDArray[np.float32]:
    """Draw noise of about unit variance that varies over ``cells`` cells (rows, columns)."""
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    coarse = source.standard_normal((rows + 1, columns + 1)).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) * np.float32(1.3)


def _mix(first: Pixels, second: Pixels, share: NDArray[np.float32]) -> Pixels:
    weight = np.clip(share, 0, 1)[..., None]
    return first * (1 - weight) + second * weight


def _colour(source: np.random.Generator, red: float, green: float, blue: float) -> Pixels:
    jitter = source.normal(0, 9, 3)
    return (np.array([red, green, blue]) + jitter).astype(np.float32)


def _sky(size: int, source: np.random.Generator) -> Pixels:
    clouds = 0.35 + 0.35 * smooth_noise(size, (3, 2), source)
    return _mix(_colour(source, 160, 195, 225), _colour(source, 228, 232, 235), clouds)


def _water(size: int, source: np.random.Generator) -> Pixels:
    depth = np.linspace(0, 1, size, dtype=np.float32)[:, None] * np.ones(size, np.float32)
    base = _mix(_colour(source, 95, 150, 190), _colour(source, 25, 70, 130), depth)
    waves = smooth_noise(size, (14, 3), source) + 0.6 * smooth_noise(size, (8, 2), source)
    return base + 15 * waves[..., None] * np.array([0.8, 1.0, 1.0], np.float32)


def _land(size: int, source: np.random.Generator) -> Pixels:
    leaves = 0.5 + 0.45 * smooth_noise(size, 6, source) + 0.25 * smooth_noise(size, 12, source)
    greens = _mix(_colour(source, 45, 85, 35), _colour(source, 120, 150, 60), leaves)
    earth = 0.15 + 0.45 * smooth_noise(size, 3, source)
    ground = _mix(greens, _colour(source, 125, 95, 60), earth)
    for _ in range(source.integers(0, 4)):
        left = int(source.uniform(0, size))
        width = max(1, int(size * source.uniform(0.04, 0.12)))
        bark = _colour(source, 80, 58, 40) + 8 * smooth_noise(size, (10, 2), source)[..., None]
        ground[:, left : left + width] = bark[:, left : left + width]
    return ground


def _treeline(ground: Pixels, horizon: int, source: np.random.Generator) -> None:
    """Let treetops stand up into the sky."""
    size = len(ground)
    tops = horizon - 0.12 * size * np.abs(smooth_noise(size, (1, 7), source)[0])
    rows = np.arange(size)[:, None]
    wood = (rows >= tops[None]) & (rows < horizon + 0.05 * size)
    ground[wood] = _colour(source, 40, 70, 35)
