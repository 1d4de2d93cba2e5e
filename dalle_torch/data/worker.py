"""What a worker of the loader does: its lanes' samples to rows of numbers.

Owns: which lanes a worker has, tokenising, padding, failures on their way to the main process. Does not own: lanes
(`lane`), processes and batches (`loader`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from dalle_torch.data.lane import Lane, Tally
from dalle_torch.data.plan import Place, Plan
from dalle_torch.data.text import TextEncoder
from dalle_torch.data.token_reader import TokenItem, TokenReader
from dalle_torch.data.tokens import TokenShard


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all workers of all hosts have in common."""

    shards: tuple[TokenShard, ...]
    reader: TokenReader
    text: TextEncoder
    plan: Plan
    rows: int
    """Rows of a lane in a batch."""
    epochs: int | None
    steps: int | None
    """Batches after which there are no more; None: never."""
    max_bad_fraction: float
    """Share of samples that may be unusable."""


@dataclass(frozen=True)
class Rows:
    """The rows of some lanes in one batch, lane after lane."""

    input_ids: np.ndarray
    """int32 [R, max_text_length]."""
    attention_mask: np.ndarray
    """int8 [R, max_text_length]."""
    codes: np.ndarray
    """uint16 [R, T]."""
    valid: np.ndarray
    """bool [R]."""
    places: dict[int, Place]
    """Lane -> the place behind its rows, in the order of the rows."""
    tally: Tally


@dataclass(frozen=True)
class Failure:
    """An error on its way to the main process, without the traceback that a worker's would carry."""

    is_os_error: bool
    message: str

    def error(self) -> Exception:
        return OSError(self.message) if self.is_os_error else ValueError(self.message)


class WorkerStream(IterableDataset[Rows | Failure]):
    """The batches of the lanes that fall to this worker; without workers, of all.

    Args:
        places: this host's lanes, and where each begins.
    """

    def __init__(self, work: Work, places: Mapping[int, Place]) -> None:
        self.work, self.places = work, places

    def __iter__(self) -> Iterator[Rows | Failure]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        work = self.work
        bound, here = work.max_bad_fraction, len(self.places)
        lanes = [
            Lane(work.plan, work.shards, work.reader, lane, self.places[lane], work.epochs, bound, here)
            for lane in sorted(self.places)[first::step]
        ]
        try:
            done = 0
            while work.steps is None or done < work.steps:
                yield take_rows(lanes, work)
                done += 1
        except (OSError, ValueError) as error:
            yield Failure(isinstance(error, OSError), str(error))
        finally:
            for lane in lanes:
                lane.close()


def take_rows(lanes: Sequence[Lane], work: Work) -> Rows:
    """The next rows of `lanes`; where a lane is at its end, rows of the empty caption that do not count."""
    items: list[TokenItem | None] = []
    tally = Tally()
    for lane in lanes:
        found = lane.take(work.rows)
        items += found
        items += [None] * (work.rows - len(found))
        tally.add(lane.tally)
        lane.tally = Tally()
    length = work.reader.image_length
    blank = bytes(2 * length)
    codes = np.frombuffer(b"".join(blank if item is None else item.codes for item in items), dtype="<u2")
    ids, mask = work.text.pad(_token_ids(items, work.text))
    valid = np.array([item is not None for item in items], dtype=bool)
    return Rows(ids, mask, codes.reshape(len(items), length), valid, {lane.lane: lane.place for lane in lanes}, tally)


def _token_ids(items: Sequence[TokenItem | None], text: TextEncoder) -> list[np.ndarray]:
    ids = [text.blank if item is None or item.tokens is None else item.tokens for item in items]
    worded = [index for index, item in enumerate(items) if item is not None and item.tokens is None and item.caption]
    if worded:
        for index, row in zip(worded, text([_caption(items[index]) for index in worded]), strict=True):
            ids[index] = row
    return ids


def _caption(item: TokenItem | None) -> str:
    return "" if item is None else item.caption
