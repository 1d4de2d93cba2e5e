"""What a scene looks like: pictures with anti-aliased edges, a pure function of scene, seed and index.

Owns: `render` and the silhouettes. Does not own: which scenes there are (`sampling`).
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from dalle_torch.shapes.grammar import BACKGROUNDS, COLORS, IMAGE_SIZE, PLACES, RELATIONS, SHAPES, SIZES, STEP, Scene
from dalle_torch.shapes.sampling import pick, uniform_draws

POSITION_JITTER: Final = 1
SIZE_JITTER: Final = 1

_OPEN = -1
_CORNERS = 6


def render(scenes: Sequence[Scene], seed: int, *, start: int = 0) -> np.ndarray:
    """Draw scenes with anti-aliased edges and a little jitter of place and size.

    What a scene leaves open is drawn at random. Picture i depends on `scenes[i]`, `seed` and `start + i` alone.

    Returns:
        uint8 [len(scenes), 64, 64, 3].
    """
    draws = uniform_draws(seed ^ 0x5EED, len(scenes), start)
    tones = tuple(BACKGROUNDS)
    named = [scene.background or pick(tones, u) for scene, u in zip(scenes, draws[:, 0], strict=True)]
    backgrounds = np.array([BACKGROUNDS[name] for name in named]).reshape(-1, 3)
    pictures = np.broadcast_to(
        backgrounds.astype(np.float32)[:, None, None, :], (len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3)
    ).copy()
    for slot in range(2):
        chosen = [i for i, scene in enumerate(scenes) if len(scene.parts) > slot]
        if not chosen:
            continue
        parts = [scenes[i].parts[slot] for i in chosen]
        geometry = np.array([_geometry(scenes[i], slot, draws[i]) for i in chosen], dtype=np.float32)
        shapes = np.array([SHAPES.index(part.shape) if part.shape else _OPEN for part in parts])
        inks = np.array([COLORS[part.color] for part in parts], dtype=np.float32)
        outlines = _outlines(seed, [2 * (start + i) + slot for i in chosen])
        alpha = coverage(shapes, geometry[:, :2], geometry[:, 2], outlines=outlines)[..., None]
        pictures[chosen] += alpha * (inks[:, None, None, :] - pictures[chosen])
    return np.rint(pictures).astype(np.uint8)


def coverage(
    shapes: np.ndarray,
    centers: np.ndarray,
    sides: np.ndarray,
    size: int = IMAGE_SIZE,
    outlines: np.ndarray | None = None,
) -> np.ndarray:
    """Share of each pixel that a shape covers, from its signed distance to the pixel's middle.

    Args:
        shapes: indices into `SHAPES`, or -1 for the polygon in `outlines`, [B].
        centers: (x, y) of the bounding boxes' middles in pixels, [B, 2].
        sides: sides of the bounding boxes, [B].
        outlines: corners in [-1, 1] x [-1, 1], their angles rising; only those of irregular shapes are used, [B, C, 2].

    Returns:
        float32 [B, size, size] in [0, 1].
    """
    axis = np.arange(size, dtype=np.float32) + 0.5
    x = axis[None, None, :] - centers[:, 0, None, None].astype(np.float32)
    y = axis[None, :, None] - centers[:, 1, None, None].astype(np.float32)
    half = (sides / 2).astype(np.float32)[:, None, None]
    distance = np.empty((len(shapes), size, size), dtype=np.float32)
    for index, name in enumerate(SHAPES):
        rows = shapes == index
        if rows.any():
            distance[rows] = _DISTANCES[name](x[rows], y[rows], half[rows])
    for row in np.flatnonzero(shapes == _OPEN):
        assert outlines is not None
        distance[row] = _polygon(x[row], y[row], outlines[row] * half[row])
    return np.clip(0.5 - distance, 0.0, 1.0)


def _triangle(x: np.ndarray, y: np.ndarray, half: np.ndarray) -> np.ndarray:
    slanted = (2 * np.abs(x) - y - half) / np.float32(5**0.5)
    return np.maximum(slanted, y - half)


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Distance [size, size] to a polygon around the origin: below 0 inside, exact but beside its corners."""
    angles = np.arctan2(y, x)
    starts = np.arctan2(corners[:, 1], corners[:, 0])
    order = np.argsort(starts)
    corners, starts = corners[order], starts[order]
    edges = np.roll(corners, -1, axis=0) - corners
    sector = np.searchsorted(starts, angles, side="right") - 1  # -1: before the first corner, so the last edge
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / np.hypot(edges[:, 0], edges[:, 1])[:, None]
    offsets = (normals * corners).sum(1)
    return (normals[sector, 0] * x + normals[sector, 1] * y - offsets[sector]).astype(np.float32)


def _outlines(seed: int, indices: Sequence[int]) -> np.ndarray:
    """Irregular polygons that fill their bounding boxes, float32 [B, 6, 2]; polygon i depends on `indices[i]` alone."""
    draws = np.concatenate([uniform_draws(seed ^ 0x0A11, 1, index) for index in indices])
    turns = (np.arange(_CORNERS) + 0.7 * draws[:, :_CORNERS] + draws[:, -1:]) * (2 * np.pi / _CORNERS)
    radii = 0.4 + 0.6 * draws[:, _CORNERS : 2 * _CORNERS]
    corners = np.stack([radii * np.cos(turns), radii * np.sin(turns)], axis=-1)
    low, high = corners.min(axis=1, keepdims=True), corners.max(axis=1, keepdims=True)
    # Each half-axis apart, so that the origin stays inside and the angles keep their order.
    return np.where(corners < 0, corners / -low, corners / high).astype(np.float32)


_DISTANCES = {
    "circle": lambda x, y, half: np.hypot(x, y) - half,
    "square": lambda x, y, half: np.maximum(np.abs(x), np.abs(y)) - half,
    "triangle": _triangle,
    "diamond": lambda x, y, half: (np.abs(x) + np.abs(y) - half) / np.float32(2**0.5),
}


def _geometry(scene: Scene, slot: int, draws: np.ndarray) -> tuple[float, float, float]:
    part = scene.parts[slot]
    side, dx, dy, size = draws[1 + 4 * slot : 5 + 4 * slot]
    if scene.relation:
        x, y = (sign if slot == 0 else -sign for sign in RELATIONS[scene.relation])
    else:
        x, y = PLACES[scene.place or pick(tuple(PLACES), draws[9])]
    middle = IMAGE_SIZE / 2
    return (
        middle + STEP * x + _jitter(POSITION_JITTER, dx),
        middle + STEP * y + _jitter(POSITION_JITTER, dy),
        SIZES[part.size or pick(tuple(SIZES), size)] + _jitter(SIZE_JITTER, side),
    )


def _jitter(bound: int, u: float) -> int:
    return int(u * (2 * bound + 1)) - bound
