"""How a tensor is cut into the blocks that Shampoo preconditions one by one.

Shapes: L tensors of one shape are handled together, [L, *shape]; a region is a grid of equally large blocks.
Owns: shapes and views. Does not own: what is computed with blocks (`preconditioner`).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


def merged_shape(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Neighbouring dimensions joined as long as their product stays within `limit`, from the left.

    Dimensions of 1 vanish; a shape of ones alone becomes (1,). A dimension above `limit` stays as it is.
    """
    merged: list[int] = []
    for size in shape:
        if size == 1:
            continue
        if merged and merged[-1] * size <= limit:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(merged) or (1,)


@dataclass(frozen=True)
class Region:
    """Blocks of one size that lie side by side in a tensor.

    Attributes:
        starts: where the region begins, in each dimension.
        counts: blocks in each dimension.
        sizes: of a block, in each dimension.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Blocks of the region in one tensor."""
        return math.prod(self.counts)

    def cut(self, stack: Tensor) -> Tensor:
        """[L, *shape] -> [L * blocks, *sizes], the blocks of a tensor side by side, the last dimension fastest.

        A view where the region is one block; else a copy.
        """
        rank = len(self.sizes)
        grid = self._grid(stack)
        order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))
        return grid.permute(order).reshape(-1, *self.sizes)

    def views(self, stack: Tensor) -> Iterator[Tensor]:
        """The blocks [*sizes] of [L, *shape] where they lie, in the order of `cut`."""
        rank = len(self.sizes)
        blocks = [self._grid(stack).permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))]
        for _ in range(1 + rank):
            blocks = [block for part in blocks for block in part.unbind()]
        yield from blocks

    def paste(self, blocks: Tensor, stack: Tensor) -> None:
        """Write [L * blocks, *sizes] back to where `cut` takes them from."""
        rank = len(self.sizes)
        order = (0, *itertools.chain.from_iterable((1 + i, 1 + rank + i) for i in range(rank)))
        self._grid(stack).copy_(blocks.view(stack.shape[0], *self.counts, *self.sizes).permute(order))

    def _grid(self, stack: Tensor) -> Tensor:
        """The region as [L, count, size, count, size, ...], a view."""
        for dim, (start, count, size) in enumerate(zip(self.starts, self.counts, self.sizes, strict=True), start=1):
            if count * size != stack.shape[dim]:
                stack = stack.narrow(dim, start, count * size)
        for dim in range(len(self.sizes), 0, -1):
            stack = stack.unflatten(dim, (self.counts[dim - 1], self.sizes[dim - 1]))
        return stack


def regions(shape: Sequence[int], block_size: int) -> tuple[Region, ...]:
    """The regions of a tensor: along each dimension whole blocks, and behind them what is left over."""
    parts = []
    for size in shape:
        whole, rest = divmod(size, block_size)
        part = [(0, whole, block_size)] if whole else []
        parts.append(part + ([(whole * block_size, 1, rest)] if rest else []))
    return tuple(
        Region(*(tuple(values) for values in zip(*combination, strict=True)))
        for combination in itertools.product(*parts)
    )
