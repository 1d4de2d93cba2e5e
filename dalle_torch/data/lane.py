"""One lane of the data: an endless stream that can be taken up at any sample.

Owns: walking through a lane's shards, shuffling within windows, what was left out on the way. Does not own: which
samples are a lane's (`plan`), batches (`loader`).
"""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from dalle_torch.data.plan import Place, Plan
from dalle_torch.data.token_reader import TokenItem, TokenReader
from dalle_torch.data.tokens import TokenShard

BAD_SAMPLES_GRACE: Final = 1000
"""Samples that are seen before too many bad ones among them stop the run."""
_NAMED: Final = 8
"""Bad samples between two reports that are named one by one, and values that a filter is shown to have seen."""
_SHOWN_LENGTH: Final = 40


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
    values: dict[str, list[str]] = field(default_factory=dict)
    """Filter -> some of the values that it left out."""

    def add(self, other: "Tally") -> None:
        self.seen += other.seen
        self.bad.update(other.bad)
        self.filtered.update(other.filtered)
        self.named = [*self.named, *other.named][:_NAMED]

    def note(self, item: TokenItem) -> None:
        """Keep what a filter saw, as far as it differs from what is kept already."""
        values = self.values.setdefault(item.filtered, [])
        if len(values) < _NAMED and (shown := repr(item.value)[:_SHOWN_LENGTH]) not in values:
            values.append(shown)

    @property
    def bad_count(self) -> int:
        return sum(self.bad.values())

    def describe(self) -> str:
        """The reasons with their counts, most frequent first."""
        pairs = [*self.bad.most_common(), *(("filtered by " + name, n) for name, n in self.filtered.most_common())]
        return ", ".join(f"{reason}: {count:,}" for reason, count in pairs) or "nothing left out"


def too_many_bad(tally: Tally, max_bad_fraction: float) -> str:
    """What to say where more samples are bad than may be."""
    bad, seen = tally.bad_count, tally.seen
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in tally.bad.most_common())
    return (
        f"{bad:,} of {seen:,} samples ({bad / max(seen, 1):.1%}) cannot be used ({reasons}), more than "
        f"max_bad_fraction={max_bad_fraction:g} allows"
    )


class Lane:
    """Takes samples out of one lane.

    Args:
        lane: which one.
        place: where to begin.
        epochs: after so many the lane is at its end; None: never.
        max_bad_fraction: share of samples that may be unusable. The loader holds the sum of its lanes to it, a batch at
            a time; an endless lane notices by itself, within a batch, what no other lane can make up for.
        lanes_here: lanes of the host, this one included.

    Raises:
        ValueError: on taking, where the lane has no usable sample in a whole epoch, or too many bad ones.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[TokenShard],
        reader: TokenReader,
        lane: int,
        place: Place,
        epochs: int | None = None,
        max_bad_fraction: float = 1.0,
        lanes_here: int = 1,
    ) -> None:
        self.plan, self.shards, self.reader, self.lane, self.epochs = plan, shards, reader, lane, epochs
        self.place = place
        """Behind the last sample that was taken."""
        self.tally = Tally()
        self.max_bad_fraction, self.lanes_here = max_bad_fraction, lanes_here
        self._all = Tally()
        """Since the lane was begun."""
        self._stream = self._items()

    def close(self) -> None:
        """Close the file that is being read; the lane is at its end."""
        # The stream knows the lane and the lane the stream, so both would wait for the collector of such cycles.
        self._stream.close()

    def take(self, count: int) -> list[TokenItem]:
        """The next `count` usable samples, with captions blanked where it is their turn; fewer only at the end."""
        found: list[TokenItem] = []
        while len(found) < count:
            step = next(self._stream, None)
            if step is None:
                break
            item, blank, self.place = step
            self.tally.seen += 1
            self._all.seen += 1
            if item.bad:
                self.tally.bad[item.bad] += 1
                self._all.bad[item.bad] += 1
                self._check_bad()
                if len(self.tally.named) < _NAMED:
                    self.tally.named.append(f"{item.key} ({item.bad})")
            elif item.filtered:
                self.tally.filtered[item.filtered] += 1
            else:
                if blank:
                    item.caption, item.tokens = "", None
                found.append(item)
        return found

    def _check_bad(self) -> None:
        if self.epochs is not None or self._all.seen < BAD_SAMPLES_GRACE:
            return
        # The host's other lanes are about as far as this one, and may have had only good samples.
        seen = self._all.seen + (self.lanes_here - 1) * (self._all.seen - self._all.bad_count)
        if self._all.bad_count > self.max_bad_fraction * seen:
            raise ValueError(f"lane {self.lane} of {self.plan.lanes}: {too_many_bad(self._all, self.max_bad_fraction)}")

    def _items(self) -> Generator[tuple[TokenItem, bool, Place], None, None]:
        epoch, position = self.place
        while self.epochs is None or epoch < self.epochs:
            usable, began = 0, position
            left_out = Tally()
            for item, blank, after in self._epoch(epoch, position):
                if item.bad:
                    left_out.bad[item.bad] += 1
                elif item.filtered:
                    left_out.filtered[item.filtered] += 1
                    left_out.note(item)
                else:
                    usable += 1
                yield item, blank, Place(epoch, after)
            if self.epochs is None and not usable and not began:
                raise ValueError(self._nothing_usable(left_out))
            epoch, position = epoch + 1, 0

    def _nothing_usable(self, left_out: Tally) -> str:
        size = self.plan.lane_size(self.lane)
        if left_out.bad_count > left_out.filtered.total():
            remedy = (
                f"most of them cannot be used, whatever max_bad_fraction={self.max_bad_fraction:g} allows; "
                "repair or leave out their shards"
            )
        else:
            seen = (
                f"; {self.reader.describe_filter(name)}, and it is {', '.join(values)}"
                for name, values in left_out.values.items()
            )
            remedy = "widen the filters, or use fewer lanes" + "".join(seen)
        return (
            f"lane {self.lane} of {self.plan.lanes} has no usable sample among {size:,} "
            f"({left_out.describe()}): {remedy}"
        )

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
