"""One lane of the data: an endless stream that can be taken up at any sample.

Owns: walking through a lane's shards, shuffling within windows, what was left out on the way. Does not own: which
samples are a lane's (`plan`), batches (`loader`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from dalle_torch.data.plan import Place, Plan
from dalle_torch.data.token_reader import TokenItem, TokenReader
from dalle_torch.data.tokens import TokenShard

_NAMED: Final = 8
"""Bad samples between two reports that are named one by one."""


@dataclass
class Tally:
    """What came by since the last report."""

    seen: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Reason -> samples that could not be used."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Filter -> samples that it left out."""
    named: list[str] = field(default_factory=list)
    """The first bad ones, each with its shard and reason."""

    def add(self, other: "Tally") -> None:
        self.seen += other.seen
        self.bad.update(other.bad)
        self.filtered.update(other.filtered)
        self.named = [*self.named, *other.named][:_NAMED]

    @property
    def bad_count(self) -> int:
        return sum(self.bad.values())

    def describe(self) -> str:
        """The reasons with their counts, most frequent first."""
        pairs = [*self.bad.most_common(), *(("filtered by " + name, n) for name, n in self.filtered.most_common())]
        return ", ".join(f"{reason}: {count:,}" for reason, count in pairs) or "nothing left out"


class Lane:
    """Takes samples out of one lane.

    Args:
        lane: which one.
        place: where to begin.
        epochs: after so many the lane is at its end; None: never.

    Raises:
        ValueError: on taking, where the lane has no usable sample in a whole epoch.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[TokenShard],
        reader: TokenReader,
        lane: int,
        place: Place,
        epochs: int | None = None,
    ) -> None:
        self.plan, self.shards, self.reader, self.lane, self.epochs = plan, shards, reader, lane, epochs
        self.place = place
        """Behind the last sample that was taken."""
        self.tally = Tally()
        self._stream = self._items()

    def take(self, count: int) -> list[TokenItem]:
        """The next `count` usable samples, with captions blanked where it is their turn; fewer only at the end."""
        found: list[TokenItem] = []
        while len(found) < count:
            step = next(self._stream, None)
            if step is None:
                break
            item, blank, self.place = step
            self.tally.seen += 1
            if item.bad:
                self.tally.bad[item.bad] += 1
                if len(self.tally.named) < _NAMED:
                    self.tally.named.append(f"{item.key} ({item.bad})")
            elif item.filtered:
                self.tally.filtered[item.filtered] += 1
            else:
                if blank:
                    item.caption, item.tokens = "", None
                found.append(item)
        return found

    def _items(self) -> Iterator[tuple[TokenItem, bool, Place]]:
        epoch, position = self.place
        while self.epochs is None or epoch < self.epochs:
            usable, began = 0, position
            left_out = Tally()
            for item, blank, after in self._epoch(epoch, position):
                if item.bad:
                    left_out.bad[item.bad] += 1
                elif item.filtered:
                    left_out.filtered[item.filtered] += 1
                else:
                    usable += 1
                yield item, blank, Place(epoch, after)
            if self.epochs is None and not usable and not began:
                size = self.plan.lane_size(self.lane)
                raise ValueError(
                    f"lane {self.lane} of {self.plan.lanes} has no usable sample among {size:,} "
                    f"({left_out.describe()}): widen the filters, or use fewer lanes"
                )
            epoch, position = epoch + 1, 0

    def _epoch(self, epoch: int, position: int) -> Iterator[tuple[TokenItem, bool, int]]:
        """(item, whether its caption is blanked, place behind it) from `position` of the epoch on."""
        width = max(self.plan.window, 1)
        number, skip = divmod(position, width)
        items = self._as_they_lie(epoch, number * width)
        window = list(islice(items, width))
        while window:
            order = self.plan.window_order(epoch, self.lane, number)
            first = number * width
            blanked = self.plan.blanked(epoch, self.lane, first, first + len(window))
            upcoming: list[TokenItem] = []
            for done, index in enumerate(order[skip:], first + skip + 1):
                yield window[index], blanked[index], done
                # One in for one out: no window is waited for as a whole but the first.
                upcoming.extend(islice(items, 1))
            upcoming.extend(islice(items, width - len(upcoming)))
            window, number, skip = upcoming, number + 1, 0

    def _as_they_lie(self, epoch: int, position: int) -> Iterator[TokenItem]:
        for segment in self.plan.segments(epoch, self.lane, position):
            shard = self.shards[segment.shard]
            for item in self.reader.read(shard, segment.first, segment.count):
                if item.bad:
                    item.key = f"{shard.url}: {item.key}"
                yield item
