"""Does a picture show what its caption says? Answered by image analysis alone, with no network.

Owns: finding the shapes in a picture of `drawing` and comparing them with a `Scene`. A picture is split into
background and regions by colour; each region's colour, area, silhouette and place are measured; what the caption
leaves open is not judged.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Final

import numpy as np
from PIL import Image

from dalle_torch.shapes.drawing import coverage
from dalle_torch.shapes.grammar import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES, STEP, Part, Scene

MIN_AREA: Final = 24
"""Pixels; smaller regions are specks. The smallest shape that is drawn has 112."""
MAX_SPECKS: Final = 24
"""Pixels that may belong neither to the background nor to a region."""
MAX_COLOR_DISTANCE: Final = 70.0
"""RGB distance beyond which a region has no colour of the palette; neighbours on the palette are 96 apart or more."""
MIN_OVERLAP: Final = 0.72
"""Intersection over union with the ideal silhouette below which a region has no shape."""

_FOREGROUND: Final = 60.0
_AREA_PER_SQUARE: Final = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "diamond": 0.5}
_SIZE_BOUND: Final = sum(SIZES.values()) / len(SIZES)
_SIDE_RANGE: Final = {"small": (SIZES["small"] - 4, _SIZE_BOUND), "large": (_SIZE_BOUND, SIZES["large"] + 5)}
_PALETTE: Final = np.array(list(COLORS.values()), dtype=np.float32)
_TONES: Final = np.array(list(BACKGROUNDS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Region:
    """One shape as it was found: names are None where nothing fits."""

    color: str | None
    shape: str | None
    side: float
    """Side of the bounding box that a shape of this silhouette and area has, in pixels."""
    center: tuple[float, float]
    """Middle of that bounding box, (x, y) in pixels."""
    overlap: float
    """Intersection over union with the ideal silhouette."""


@dataclass(frozen=True)
class Report:
    """What was found wrong: property ("parts", "background", "color", "shape", "size", "relation", "place") -> why."""

    failures: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        return "ok" if self.ok else "; ".join(f"{name}: {why}" for name, why in self.failures.items())


def check(image: np.ndarray | Image.Image, scene: Scene) -> Report:
    """Judge one picture.

    Args:
        image: uint8 [64, 64, 3], or a PIL image of that size.

    Raises:
        ValueError: the picture is not 64 x 64 RGB bytes.
    """
    background, regions, specks = analyse(image)
    failures: dict[str, str] = {}
    if background is None or scene.background not in (None, background):
        failures["background"] = f"expected {scene.background or 'one of the palette'}, found {background or 'none'}"
    if len(regions) != len(scene.parts) or specks > MAX_SPECKS:
        failures["parts"] = f"expected {len(scene.parts)}, found {len(regions)} and {specks} stray pixels"
    if len(regions) >= len(scene.parts):
        found = [dict(_compare(scene, match)) for match in permutations(regions, len(scene.parts))]
        best: dict[str, str] = min(found, key=len)
        failures |= best
    return Report(failures)


def analyse(image: np.ndarray | Image.Image) -> tuple[str | None, list[Region], int]:
    """Split a picture into its background's name, its regions (largest first) and the number of stray pixels."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.shape != (64, 64, 3):
        raise ValueError(f"a picture is uint8 [64, 64, 3], got {pixels.dtype} {list(pixels.shape)}")
    pixels = pixels.astype(np.float32)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                            pixels[2:-2, :2].reshape(-1, 3), pixels[2:-2, -2:].reshape(-1, 3)])  # fmt: skip
    tone = np.median(frame, axis=0)
    background = _nearest(tone, _TONES, tuple(BACKGROUNDS))
    foreground = _majority(np.linalg.norm(pixels - tone, axis=-1) > _FOREGROUND)
    labels = _components(foreground)
    regions, specks = [], 0
    for label, area in zip(*np.unique(labels[foreground], return_counts=True), strict=True):
        if area < MIN_AREA:
            specks += int(area)
        else:
            regions.append(_measure(pixels, labels == label, tone))
    return background, sorted(regions, key=lambda region: -region.side), specks


def _compare(scene: Scene, match: tuple[Region, ...]) -> Iterator[tuple[str, str]]:
    for part, region in zip(scene.parts, match, strict=True):
        yield from _compare_part(part, region)
    if scene.relation:
        offset = np.subtract(match[0].center, match[1].center)
        wanted = np.array(RELATIONS[scene.relation])
        along, across = float(offset @ wanted), float(np.abs(offset) @ (1 - np.abs(wanted)))
        if along < STEP or across > STEP:
            yield "relation", f"expected {scene.relation!r}, found an offset of {offset.round(1).tolist()} pixels"
    if scene.place:
        offset = np.subtract(match[0].center, 32) - STEP * np.array(PLACES[scene.place])
        if np.abs(offset).max() > STEP / 2:
            yield "place", f"expected {scene.place!r}, found it {offset.round(1).tolist()} pixels away from there"


def _compare_part(part: Part, region: Region) -> Iterator[tuple[str, str]]:
    if region.color != part.color:
        yield "color", f"expected {part.color}, found {region.color or 'none'}"
    if part.shape and region.shape != part.shape:
        yield "shape", f"expected {part.shape}, found {region.shape or 'none'} (overlap {region.overlap:.2f})"
    # An irregular shape's area does not tell the side of its bounding box.
    any_size = _SIDE_RANGE["small"][0], _SIDE_RANGE["large"][1]
    low, high = _SIDE_RANGE[part.size] if part.size and part.shape else any_size
    if not low <= region.side <= high:
        yield "size", f"expected {low:g} to {high:g} pixels, found {region.side:.1f}"


def _measure(pixels: np.ndarray, region: np.ndarray, tone: np.ndarray) -> Region:
    inner = region & (_neighbours(region) == 9)
    ink = np.median(pixels[inner if inner.any() else region], axis=0)
    # Along the line from background to ink the middle is the silhouette's edge, whatever the contrast.
    way = ink - tone
    share = (pixels - tone) @ way / max(float(way @ way), 1.0)
    mask = (_neighbours(region) > 0) & (share > 0.5)
    area = float(mask.sum())
    if not area:
        return Region(None, None, 0.0, (0.0, 0.0), 0.0)
    rows, columns = np.nonzero(mask)
    centroid = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
    sides = np.array([(area / _AREA_PER_SQUARE[name]) ** 0.5 for name in SHAPES])
    centers = np.repeat(centroid[None], len(SHAPES), axis=0)
    # A triangle's centroid lies a sixth of its height below the middle of its bounding box.
    centers[SHAPES.index("triangle"), 1] -= sides[SHAPES.index("triangle")] / 6
    ideal = coverage(np.arange(len(SHAPES)), centers, sides) > 0.5
    overlaps = (ideal & mask).sum((1, 2)) / np.maximum((ideal | mask).sum((1, 2)), 1)
    best = int(overlaps.argmax())
    return Region(
        color=_nearest(ink, _PALETTE, tuple(COLORS)),
        shape=SHAPES[best] if overlaps[best] >= MIN_OVERLAP else None,
        side=float(sides[best]),
        center=(float(centers[best, 0]), float(centers[best, 1])),
        overlap=float(overlaps[best]),
    )


def _nearest(color: np.ndarray, palette: np.ndarray, names: tuple[str, ...]) -> str | None:
    distances = np.linalg.norm(palette - color, axis=-1)
    best = int(distances.argmin())
    return names[best] if distances[best] <= MAX_COLOR_DISTANCE else None


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """How many of the 3 x 3 pixels around each pixel are set; outside the picture nothing is."""
    padded = np.pad(mask, 1).astype(np.int16)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _majority(mask: np.ndarray) -> np.ndarray:
    return _neighbours(mask) >= 5


def _components(mask: np.ndarray) -> np.ndarray:
    """Number the regions that touch along an edge: each takes the least index among its pixels; 0 is unset."""
    unset = mask.size + 1
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), unset)
    while True:
        padded = np.pad(labels, 1, constant_values=unset)
        around = np.minimum.reduce([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels])
        spread = np.where(mask, around, unset)
        if np.array_equal(spread, labels):
            return np.where(mask, labels, 0)
        labels = spread
