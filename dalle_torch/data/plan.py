"""Who reads what in which order: arithmetic on the sizes of shards, without looking at one.

All samples of an epoch, shard after shard in an order of the epoch's own, are cut into as many equal ranges as there
are lanes. A lane is an endless stream of its own; batch row r comes from lane r // (rows of a lane). So the batches
depend on the number of lanes, and neither on the number of hosts, which share the lanes, nor on the number of workers,
which share a host's lanes.

Owns: ranges, windows, which caption is blanked. Does not own: reading (`lane`), batches (`loader`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, NamedTuple

import numpy as np

from dalle_torch.hashing import permutation, uniform

_SHARDS, _WINDOW, _BLANK = range(3)
"""What random numbers are for."""
MAX_POSITION: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive samples of a shard."""

    shard: int
    first: int
    count: int


class Place(NamedTuple):
    """How far a lane has come: samples of the epoch that it is done with, those that were left out included."""

    epoch: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of samples; equal on every host."""

    counts: tuple[int, ...]
    """Samples of each shard."""
    lanes: int
    seed: int = 0
    window: int = 1
    """Samples of a lane that are shuffled among each other; 1 and 0 keep them as they lie."""
    shuffle_shards: bool = True
    blank_prob: float = 0.0

    @cached_property
    def total(self) -> int:
        return sum(self.counts)

    def lane_range(self, lane: int) -> tuple[int, int]:
        """First sample of the lane and the one behind its last, counted over the whole epoch."""
        return lane * self.total // self.lanes, (lane + 1) * self.total // self.lanes

    def lane_size(self, lane: int) -> int:
        first, end = self.lane_range(lane)
        return end - first

    def segments(self, epoch: int, lane: int, position: int = 0) -> Iterator[Segment]:
        """What the lane reads in the epoch, from `position` on, before windows are shuffled."""
        order, starts = _order(self, epoch)
        first, end = self.lane_range(lane)
        first += position
        place = int(np.searchsorted(starts, first, side="right")) - 1
        while first < end:
            stop = min(end, int(starts[place + 1]))
            if stop > first:
                yield Segment(int(order[place]), first - int(starts[place]), stop - first)
            first, place = stop, place + 1

    def window_order(self, epoch: int, lane: int, number: int) -> Sequence[int]:
        """The order in which window `number` of the lane comes out, as places in the window."""
        size = min(max(self.window, 1), self.lane_size(lane) - number * max(self.window, 1))
        if size <= 1 or self.window <= 1:
            return range(max(size, 0))
        order: list[int] = permutation((self.seed, epoch, _WINDOW, lane, number), size).tolist()
        return order

    def blanked(self, epoch: int, lane: int, first: int, stop: int) -> list[bool]:
        """Whether the captions of the lane's samples `first` to `stop` (as they lie) are left out."""
        if self.blank_prob <= 0:
            return [False] * (stop - first)
        start, _ = self.lane_range(lane)
        draws = uniform((self.seed, epoch, _BLANK), start + first, start + stop)
        found: list[bool] = (draws < self.blank_prob).tolist()
        return found


@lru_cache(maxsize=8)
def _order(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Shards in the epoch's order, and where each begins, with the end of the last."""
    counts = np.array(plan.counts, dtype=np.int64)
    order = np.arange(len(counts))
    if plan.shuffle_shards:
        order = permutation((plan.seed, epoch, _SHARDS), len(counts))
    return order, np.concatenate([[0], np.cumsum(counts[order])])
