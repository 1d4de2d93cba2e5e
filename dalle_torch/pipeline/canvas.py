"""The grid of codes that pictures are drawn on: as large as the model's own, or larger and drawn window by window.

Shapes: B pictures, g codes a side of the model's own grid, R x C codes of the canvas (g x g without tiling).
Owns: where windows lie, what a window is given, how what is not yet drawn looks. Does not own: drawing a window
(`models.generation`), from codes to pixels (`models.vqgan`, whose convolutions take a canvas of any size at once).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

UNDRAWN = -1
"""Stands in a canvas where no code has been drawn yet."""


@dataclass(frozen=True)
class Canvas:
    """The layout of one picture's codes.

    A picture of `tile=(rows, columns)` consists of that many windows, each a whole grid of the model, that overlap by
    `overlap` codes. A window is drawn with the codes it shares with its upper and left neighbours given, so that the
    picture goes on across the seams in the space of codes, where it is drawn, and not in pixels.

    Raises:
        ValueError: a number is out of range; every offender is named.
    """

    window: int
    """Side g of the model's grid."""
    tile: tuple[int, int] = (1, 1)
    overlap: int = 0
    """Codes that neighbouring windows share."""

    def __post_init__(self) -> None:
        problems = []
        if len(self.tile) != 2 or not all(isinstance(count, int) and count >= 1 for count in self.tile):
            problems.append(f"tile={self.tile} must be (rows, columns), each at least 1")
        elif self.tile != (1, 1) and not 0 < self.overlap < self.window:
            problems.append(f"tile_overlap={self.overlap} must lie between 1 and {self.window - 1} codes")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        rows, columns = ((count - 1) * self._step + self.window for count in self.tile)
        return rows, columns

    @property
    def size(self) -> int:
        """Codes of a picture."""
        return self.shape[0] * self.shape[1]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Upper left corners of the windows, in the order they are drawn."""
        return [(r * self._step, c * self._step) for r in range(self.tile[0]) for c in range(self.tile[1])]

    @property
    def _step(self) -> int:
        return self.window - self.overlap

    def cut(self, codes: Tensor, corner: tuple[int, int]) -> Tensor:
        """The window at `corner` of canvases [B, R, C] -> [B, g * g], `UNDRAWN` where it is to be drawn."""
        y, x = corner
        return codes[:, y : y + self.window, x : x + self.window].flatten(1).clone()

    def put(self, codes: Tensor, corner: tuple[int, int], drawn: Tensor) -> None:
        """Write the leading codes of a window, [B, n], into canvases [B, R, C]."""
        y, x = corner
        window = self.cut(codes, corner)
        window[:, : drawn.shape[1]] = drawn.to(codes.device)
        codes[:, y : y + self.window, x : x + self.window] = window.unflatten(1, (self.window, self.window))


def fill_undrawn(codes: Tensor) -> Tensor:
    """Canvases [B, R, C] with each `UNDRAWN` code replaced by the last one above it (in the first row: left of it).

    So the decoder sees something like what is there already, and the border of the drawn part keeps its look.
    """
    filled = codes.clone()
    filled[:, 0, 0] = filled[:, 0, 0].clamp_min(0)
    for left, right in pairwise(range(codes.shape[2])):
        filled[:, 0, right] = torch.where(filled[:, 0, right] < 0, filled[:, 0, left], filled[:, 0, right])
    for above, below in pairwise(range(codes.shape[1])):
        filled[:, below] = torch.where(filled[:, below] < 0, filled[:, above], filled[:, below])
    return filled


def grey_out(pixels: Tensor, codes: Tensor, grey: float) -> Tensor:
    """Pixels [B, 3, H, W] with the patches of `UNDRAWN` codes [B, R, C] in one flat grey."""
    factor = pixels.shape[-1] // codes.shape[-1]
    undrawn = (codes == UNDRAWN).to(pixels.device)
    undrawn = undrawn.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return pixels.masked_fill(undrawn[:, None], grey)
