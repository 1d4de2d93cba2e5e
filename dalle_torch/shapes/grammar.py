"""What captions of shapes can say.

Owns: the words (`COLORS`, `SHAPES`, ...), `Scene` and reading a caption back into one. Does not own: which scenes come
(`sampling`), what they look like (`drawing`), judging a picture (`checker`).

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
from typing import Final

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


def _require(name: str, value: str | None, choices: Sequence[str] | dict, *, optional: bool = False) -> None:
    if not (value in choices or (optional and value is None)):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
