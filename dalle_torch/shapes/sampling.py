"""An endless sequence of scenes that is a pure function of a seed.

Owns: which scenes come, with which shares of what. Does not own: what they look like (`drawing`).
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from dalle_torch.hashing import splitmix
from dalle_torch.shapes.grammar import BACKGROUNDS, COLORS, HELD_OUT, PLACES, RELATIONS, SHAPES, SIZES, Part, Scene

_T = TypeVar("_T")

_DRAWS = 20  # independent random numbers that one scene may use


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
    draws = uniform_draws(seed, n, start)
    return [_scene(list(row), unseen, single, leave_out, open_shapes) for row in draws]


def sample_prompts(n: int, seed: int, unseen: bool = False) -> list[str]:
    """Captions of `sample_scenes` with nothing left open; with `unseen` each names a pair of `HELD_OUT`."""
    return [scene.caption for scene in sample_scenes(n, seed, unseen=unseen)]


def _scene(draws: list[float], unseen: bool, single: float, leave_out: float, open_shapes: float) -> Scene:
    drawn = iter(draws)
    n_parts = 1 if next(drawn) < single else 2
    odd = int(next(drawn) * n_parts)
    parts = []
    for slot in range(n_parts):
        choices = _HELD_OUT_PAIRS if unseen and slot == odd else _SEEN_PAIRS
        color, shape = pick(choices, next(drawn))
        is_open = draws[-1 - slot] < open_shapes and (color, shape) not in HELD_OUT
        size = pick(tuple(SIZES), next(drawn))
        size_left_out = next(drawn) < leave_out
        parts.append(Part(color=color, shape=None if is_open else shape, size=None if size_left_out else size))
    tone = pick(tuple(BACKGROUNDS), next(drawn))
    background = None if next(drawn) < leave_out else tone
    where = next(drawn)
    if n_parts == 2:
        return Scene(parts=tuple(parts), relation=pick(tuple(RELATIONS), where), background=background)
    place = None if next(drawn) < leave_out else pick(tuple(PLACES), where)
    return Scene(parts=tuple(parts), place=place, background=background)


_HELD_OUT_PAIRS = tuple(sorted(HELD_OUT))
_SEEN_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)


def pick(choices: Sequence[_T], u: float) -> _T:
    return choices[int(u * len(choices))]


def uniform_draws(seed: int, n: int, start: int) -> np.ndarray:
    """Numbers in [0, 1), [n, _DRAWS]: a hash (SplitMix64) of seed, index and column, so any index is at hand."""
    counter = np.arange(start * _DRAWS, (start + n) * _DRAWS, dtype=np.uint64).reshape(n, _DRAWS)
    key = splitmix(np.array(seed % 2**64, dtype=np.uint64))
    return (splitmix(counter ^ key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
