"""Captioned pictures of simple shapes: an endless data set that is a pure function of a seed.

Owns: the grammar (`Scene`, `parse_caption`), the drawing (`render`) and the sampling of scenes (`sample_scenes`,
`sample_prompts`). Does not own: judging a picture (`shapes_checker`), text ids, image codes.

The grammar, with `|` between choices and brackets around what may be left out:

    caption    := single | pair
    single     := part [place] [background]
    pair       := part relation part [background]
    part       := ("a" | "an") [size] colour (shape | "shape")
    place      := "in the centre" | "at the" ("top left" | "top" | ... | "bottom right")
    relation   := "to the left of" | "to the right of" | "above" | "below"
    background := "on a" ("white" | "black" | "gray") "background"
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from dalle_torch.data.hashing import splitmix

_T = TypeVar("_T")

IMAGE_SIZE: Final = 64
"""Pixels of a picture's side."""

COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (225, 45, 45),
    "orange": (245, 135, 20),
    "yellow": (250, 230, 60),
    "green": (30, 160, 60),
    "cyan": (60, 205, 225),
    "blue": (45, 75, 215),
    "purple": (160, 40, 200),
}
BACKGROUNDS: Final[dict[str, tuple[int, int, int]]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
SHAPES: Final = ("circle", "square", "triangle", "diamond")
OPEN_SHAPE: Final = "shape"
"""What a caption says instead where it leaves the shape open; drawn as an irregular polygon, none of `SHAPES`."""
SIZES: Final[dict[str, int]] = {"small": 16, "large": 26}
"""Side of a shape's bounding box in pixels, before jitter."""
RELATIONS: Final[dict[str, tuple[int, int]]] = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Where the first part lies, seen from the second one: (x, y) with y pointing down."""
PLACES: Final[dict[str, tuple[int, int]]] = {
    "at the top left": (-1, -1),
    "at the top": (0, -1),
    "at the top right": (1, -1),
    "at the left": (-1, 0),
    "in the centre": (0, 0),
    "at the right": (1, 0),
    "at the bottom left": (-1, 1),
    "at the bottom": (0, 1),
    "at the bottom right": (1, 1),
}
"""Where a single part lies, seen from the middle of the picture."""
HELD_OUT: Final = frozenset({("red", "triangle"), ("green", "diamond"), ("yellow", "square"), ("purple", "circle")})
"""(colour, shape) pairs that no training picture shows."""

STEP: Final = 16
"""Pixels from the middle of the picture to the middle of an outer place."""
POSITION_JITTER: Final = 1
SIZE_JITTER: Final = 1

_OPEN = -1
_CORNERS = 6
_DRAWS = 20  # independent random numbers that one scene may use
_PART = "an? (?:(?P<size{{0}}>{}) )?(?P<color{{0}}>{}) (?P<shape{{0}}>{})".format(
    "|".join(SIZES), "|".join(COLORS), "|".join([*SHAPES, OPEN_SHAPE])
)
_BACKGROUND = rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
_PLACE = rf"(?: (?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))}))?"
_SINGLE = re.compile(_PART.format(0) + _PLACE + _BACKGROUND)
_PAIR = re.compile(_PART.format(0) + rf" (?P<relation>{'|'.join(RELATIONS)}) " + _PART.format(1) + _BACKGROUND)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One shape of a scene; `shape` and `size` are None where the caption leaves them open."""

    color: str
    shape: str | None
    size: str | None = None

    def __post_init__(self) -> None:
        _require("color", self.color, COLORS)
        _require("shape", self.shape, SHAPES, optional=True)
        _require("size", self.size, SIZES, optional=True)

    @property
    def held_out(self) -> bool:
        """Whether no training picture shows this colour on this shape."""
        return (self.color, self.shape) in HELD_OUT

    @property
    def phrase(self) -> str:
        words = f"{self.color} {self.shape or OPEN_SHAPE}"
        words = f"{self.size} {words}" if self.size else words
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says: one part with a place, or two with a relation; None is what the caption leaves open.

    Raises:
        ValueError: a word is not in the grammar, or place and relation do not fit the number of parts.
    """

    parts: tuple[Part, ...]
    relation: str | None = None
    place: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        _require("relation", self.relation, RELATIONS, optional=True)
        _require("place", self.place, PLACES, optional=True)
        _require("background", self.background, BACKGROUNDS, optional=True)
        if len(self.parts) not in (1, 2):
            raise ValueError(f"a scene has one or two parts, not {len(self.parts)}")
        if (len(self.parts) == 2) != (self.relation is not None):
            raise ValueError(f"{len(self.parts)} parts do not go with relation={self.relation!r}: two parts need one")
        if len(self.parts) == 2 and self.place is not None:
            raise ValueError(f"place={self.place!r} needs a single part; two parts have a relation")

    @property
    def held_out(self) -> bool:
        """Whether a part shows a colour and shape that were never trained on together."""
        return any(part.held_out for part in self.parts)

    @property
    def caption(self) -> str:
        words = [self.parts[0].phrase]
        if self.relation:
            words += [self.relation, self.parts[1].phrase]
        if self.place:
            words.append(self.place)
        if self.background:
            words.append(f"on a {self.background} background")
        return " ".join(words)


def parse_caption(caption: str) -> Scene:
    """Read a caption back into its scene; the inverse of `Scene.caption`.

    Case, surrounding space, a final full stop and the spellings "center" and "grey" make no difference.

    Raises:
        ValueError: the caption does not follow the grammar.
    """
    text = " ".join(caption.lower().split()).removesuffix(".").replace("center", "centre").replace("grey", "gray")
    found = _SINGLE.fullmatch(text) or _PAIR.fullmatch(text)
    if found is None:
        raise ValueError(
            f"caption {caption!r} does not follow the grammar, e.g. 'a small red circle to the left of a large blue "
            "square on a white background' or 'a large green triangle at the top left on a black background'"
        )
    fields = found.groupdict()
    parts = tuple(
        Part(color=fields[f"color{n}"], shape=None if shape == OPEN_SHAPE else shape, size=fields[f"size{n}"])
        for n in range(2)
        if (shape := fields.get(f"shape{n}"))
    )
    return Scene(
        parts=parts, relation=fields.get("relation"), place=fields.get("place"), background=fields["background"]
    )


def sample_scenes(
    n: int,
    seed: int,
    *,
    start: int = 0,
    unseen: bool = False,
    single: float = 0.4,
    leave_out: float = 0.0,
    open_shapes: float = 0.0,
) -> list[Scene]:
    """Scenes `start` to `start + n` of the endless sequence that `seed` names.

    Args:
        unseen: one part of each scene is one of `HELD_OUT`; otherwise none is.
        single: share of scenes with one part.
        leave_out: share of sizes, places and backgrounds that the captions leave open.
        open_shapes: share of shapes that the captions leave open; a pair of `HELD_OUT` is always named.
    """
    draws = _uniform(seed, n, start)
    return [_scene(list(row), unseen, single, leave_out, open_shapes) for row in draws]


def sample_prompts(n: int, seed: int, unseen: bool = False) -> list[str]:
    """Captions of `sample_scenes` with nothing left open; with `unseen` each names a pair of `HELD_OUT`."""
    return [scene.caption for scene in sample_scenes(n, seed, unseen=unseen)]


def render(scenes: Sequence[Scene], seed: int, *, start: int = 0) -> np.ndarray:
    """Draw scenes with anti-aliased edges and a little jitter of place and size.

    What a scene leaves open is drawn at random. Picture i depends on `scenes[i]`, `seed` and `start + i` alone.

    Returns:
        uint8 [len(scenes), 64, 64, 3].
    """
    draws = _uniform(seed ^ 0x5EED, len(scenes), start)
    tones = tuple(BACKGROUNDS)
    named = [scene.background or _pick(tones, u) for scene, u in zip(scenes, draws[:, 0], strict=True)]
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
    draws = np.concatenate([_uniform(seed ^ 0x0A11, 1, index) for index in indices])
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
        x, y = PLACES[scene.place or _pick(tuple(PLACES), draws[9])]
    middle = IMAGE_SIZE / 2
    return (
        middle + STEP * x + _jitter(POSITION_JITTER, dx),
        middle + STEP * y + _jitter(POSITION_JITTER, dy),
        SIZES[part.size or _pick(tuple(SIZES), size)] + _jitter(SIZE_JITTER, side),
    )


def _scene(draws: list[float], unseen: bool, single: float, leave_out: float, open_shapes: float) -> Scene:
    drawn = iter(draws)
    n_parts = 1 if next(drawn) < single else 2
    odd = int(next(drawn) * n_parts)
    parts = []
    for slot in range(n_parts):
        choices = _HELD_OUT_PAIRS if unseen and slot == odd else _SEEN_PAIRS
        color, shape = _pick(choices, next(drawn))
        is_open = draws[-1 - slot] < open_shapes and (color, shape) not in HELD_OUT
        size = _pick(tuple(SIZES), next(drawn))
        size_left_out = next(drawn) < leave_out
        parts.append(Part(color=color, shape=None if is_open else shape, size=None if size_left_out else size))
    tone = _pick(tuple(BACKGROUNDS), next(drawn))
    background = None if next(drawn) < leave_out else tone
    where = next(drawn)
    if n_parts == 2:
        return Scene(parts=tuple(parts), relation=_pick(tuple(RELATIONS), where), background=background)
    place = None if next(drawn) < leave_out else _pick(tuple(PLACES), where)
    return Scene(parts=tuple(parts), place=place, background=background)


_HELD_OUT_PAIRS = tuple(sorted(HELD_OUT))
_SEEN_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)


def _pick(choices: Sequence[_T], u: float) -> _T:
    return choices[int(u * len(choices))]


def _jitter(bound: int, u: float) -> int:
    return int(u * (2 * bound + 1)) - bound


def _uniform(seed: int, n: int, start: int) -> np.ndarray:
    """Numbers in [0, 1), [n, _DRAWS]: a hash (SplitMix64) of seed, index and column, so any index is at hand."""
    counter = np.arange(start * _DRAWS, (start + n) * _DRAWS, dtype=np.uint64).reshape(n, _DRAWS)
    key = splitmix(np.array(seed % 2**64, dtype=np.uint64))
    return (splitmix(counter ^ key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _require(name: str, value: str | None, choices: Sequence[str] | dict, *, optional: bool = False) -> None:
    if not (value in choices or (optional and value is None)):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
