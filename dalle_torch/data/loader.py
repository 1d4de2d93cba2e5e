"""Batches of tokens for the hosts of a run, from shards, without ever losing the place.

A loader owns its host's lanes and gives an equal number of them to each worker. Workers send what their lanes have for
a batch together with the place behind it, so the state of the loader is that of the batches taken, whatever is read
ahead. Training batches never end: each lane goes on with the next epoch by itself, so hosts whose shards are uneven do
not wait for each other. Evaluation ends after as many batches on every host, filled up with rows that do not count.

Owns: batches, state, the bound on bad samples. Does not own: order (`plan`), processes (`processes`), samples (`lane`,
`token_reader`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dalle_torch.data.lane import BAD_SAMPLES_GRACE, Tally, too_many_bad
from dalle_torch.data.plan import Place, Plan
from dalle_torch.data.processes import worker_batches
from dalle_torch.data.text import TextEncoder
from dalle_torch.data.token_reader import TokenReader
from dalle_torch.data.tokens import TokenShard, fingerprint
from dalle_torch.data.worker import Failure, Rows, Work, WorkerStream
from dalle_torch.log import get_logger

logger = get_logger(__name__)

STATE_FORMAT: Final = 1
_MAX_NAMED = 20
"""Bad samples that are logged one by one."""


@dataclass(frozen=True)
class TokenBatch:
    """B rows of one host."""

    input_ids: Tensor
    """int64 [B, max_text_length]."""
    attention_mask: Tensor
    """int64 [B, max_text_length]."""
    labels: Tensor
    """Codes, int64 [B, T]."""
    valid: Tensor
    """bool [B]; false for rows that only fill up the end of an evaluation set."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What `DalleBart.forward` takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}


class TokenLoader:
    """Iterates over one host's batches. For training every iteration goes on where the last one was left; for
    evaluation each begins anew.

    Args:
        shards: the same on every host (`tokens.find_token_shards`).
        reader, text: what the model wants of a sample.
        plan: the order, whose lanes the hosts share.
        batch_size: rows of all hosts together.
        workers: processes that read; 0 reads in this one.
        max_bad_fraction: share of samples that may be unusable.
        epochs: 1 for evaluation; None goes on for ever.

    Raises:
        ValueError: lanes, hosts and batch size do not fit each other, or there are fewer samples than lanes.
    """

    def __init__(
        self,
        shards: Sequence[TokenShard],
        reader: TokenReader,
        text: TextEncoder,
        plan: Plan,
        *,
        batch_size: int,
        workers: int = 0,
        max_bad_fraction: float = 0.01,
        host_index: int = 0,
        host_count: int = 1,
        epochs: int | None = None,
    ) -> None:
        _check_split(plan, batch_size, host_index, host_count, endless=epochs is None)
        self.shards, self.plan, self.batch_size, self.epochs = shards, plan, batch_size, epochs
        self.max_bad_fraction = max_bad_fraction
        share = plan.lanes // host_count
        self.lanes = range(host_index * share, (host_index + 1) * share)
        self.rows = batch_size // plan.lanes
        """Rows of a lane in a batch."""
        self.workers = min(workers, len(self.lanes))
        self.tally = Tally()
        """What came by since this loader was made, as far as its batches were taken."""
        self._work = Work(shards=tuple(shards), reader=reader, text=text, plan=plan, rows=self.rows, epochs=epochs,
                          steps=None if epochs is None else self.steps, max_bad_fraction=max_bad_fraction)  # fmt: skip
        self._places = {lane: Place(0, 0) for lane in self.lanes}
        self._logged = 0

    @property
    def steps(self) -> int:
        """Batches of an epoch, the same on every host; training batches do not stop there."""
        longest = max(self.plan.lane_size(lane) for lane in range(self.plan.lanes))
        return -(-longest // self.rows)

    def __iter__(self) -> Iterator[TokenBatch]:
        """Batches of this host, each with the same number of rows.

        Raises:
            OSError: a shard cannot be read, or a worker was killed (ChildProcessError).
            ValueError: too many samples are bad, or a lane has none.
        """
        if self.epochs is not None:
            self._places = {lane: Place(0, 0) for lane in self.lanes}
        streams = max(self.workers, 1)
        parts: list[Rows] = []
        for part in self._parts(streams):
            if isinstance(part, Failure):
                raise part.error()
            parts.append(part)
            if len(parts) == streams:
                yield self._batch(parts)
                parts = []
        self._check_bad(grace=0)

    def state_dict(self) -> dict[str, Any]:
        """Where the batches taken so far end; plain numbers and strings, and this host's lanes alone."""
        return {
            "format": STATE_FORMAT,
            "shards": fingerprint(self.shards),
            "seed": self.plan.seed,
            "lanes": self.plan.lanes,
            "window": self.plan.window,
            "filter": self._work.reader.filter,
            "min_clip_score": self._work.reader.min_clip_score,
            "max_clip_score": self._work.reader.max_clip_score,
            "blank_prob": self.plan.blank_prob,
            "places": {str(lane): list(place) for lane, place in self._places.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the last batch of `state`: with any number of workers, and, where the states of all hosts were
        put together by `merge_states`, with any number of hosts.

        The bounds on clip scores and the probability of blank captions may be others than those of the state: make the
        loader with the new ones and load the state, and they hold from its place on; a warning says what has changed.

        Raises:
            ValueError: the state is malformed, or belongs to other shards, another order or another filter.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of the data is {state!r:.60}: what state_dict gave is due")
        ours = self.state_dict()
        wrong = [
            f"{name} {state.get(name)!r}, here {ours[name]!r}"
            for name in ("format", "shards", "seed", "lanes", "window", "filter")
            if state.get(name) != ours[name]
        ]
        if wrong:
            raise ValueError(
                f"the state of the data belongs to another run: {'; '.join(wrong)}; use its options or begin without it"
            )
        places = _places(state)
        missing = [lane for lane in self.lanes if str(lane) not in places]
        if missing:
            raise ValueError(
                f"the state of the data lacks lanes {missing[0]} to {missing[-1]}: it comes from another host, or from "
                "another number of hosts; put the states of all hosts together"
            )
        self._places = {lane: self._place(lane, places[str(lane)]) for lane in self.lanes}
        changed = [
            f"{name} {state.get(name)!r}, from here on {ours[name]!r}"
            for name in ("min_clip_score", "max_clip_score", "blank_prob")
            if state.get(name) != ours[name]
        ]
        if changed:
            logger.warning("the data goes on with other options: %s", "; ".join(changed))

    def _place(self, lane: int, value: Any) -> Place:
        size = self.plan.lane_size(lane)
        numbers = list(value) if isinstance(value, list | tuple) else []
        if len(numbers) != 2 or any(type(number) is not int or number < 0 for number in numbers) or numbers[1] > size:
            raise ValueError(
                f"the state of the data has {value!r} for lane {lane}: [epoch, position up to {size}] is due"
            )
        return Place(*numbers)

    def _parts(self, streams: int) -> Iterator[Rows | Failure]:
        stream = WorkerStream(self._work, dict(self._places))
        if not self.workers:
            yield from stream
            return
        yield from worker_batches(stream, streams)

    def _batch(self, parts: Sequence[Rows]) -> TokenBatch:
        for part in parts:
            self._places.update(part.places)
            self.tally.add(part.tally)
        self._report(parts)
        if self.epochs is None:
            self._check_bad(BAD_SAMPLES_GRACE)
        order = np.argsort([lane for part in parts for lane in part.places], kind="stable")

        def rows(name: str) -> Tensor:
            values = np.concatenate([getattr(part, name) for part in parts])
            by_lane = values.reshape(len(order), self.rows, *values.shape[1:])[order]
            return torch.from_numpy(by_lane.reshape(values.shape))

        return TokenBatch(rows("input_ids").long(), rows("attention_mask").long(), rows("codes").long(), rows("valid"))

    def _report(self, parts: Sequence[Rows]) -> None:
        bad = sum(part.tally.bad_count for part in parts)
        if not bad:
            return
        for part in parts:
            for name in part.tally.named:
                if self._logged < _MAX_NAMED:
                    logger.warning("left out: %s", name)
                    self._logged += 1
                    if self._logged == _MAX_NAMED:
                        logger.warning("further samples that are left out are counted only")
        # Every time that their number has doubled.
        total = self.tally.bad_count
        if total >= _MAX_NAMED and (total - bad).bit_length() != total.bit_length():
            logger.warning("%d of %d samples could not be used: %s", total, self.tally.seen, self.tally.describe())

    def _check_bad(self, grace: int) -> None:
        if self.tally.bad_count > self.max_bad_fraction * max(self.tally.seen, grace):
            raise ValueError(too_many_bad(self.tally, self.max_bad_fraction))


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all hosts as one, which fits any number of hosts.

    Raises:
        ValueError: there is none, they belong to different runs, or they have lanes in common.
    """
    if not states:
        raise ValueError("there is no state of the data to be put together")
    merged = {**states[0], "places": {}}
    for state in states:
        if {**state, "places": {}} != {**merged, "places": {}}:
            raise ValueError("the states of the data belong to different runs")
        places = _places(state)
        if common := merged["places"].keys() & places.keys():
            raise ValueError(f"two states of the data have lane {min(common, key=int)}: give each host's once")
        merged["places"].update(places)
    return merged


def _places(state: Mapping[str, Any]) -> Mapping[str, Any]:
    places = state.get("places")
    if not isinstance(places, Mapping):
        raise ValueError(f"the state of the data has {places!r:.60} for places: lane -> [epoch, position] is due")
    return places


def _check_split(plan: Plan, batch_size: int, host_index: int, host_count: int, *, endless: bool) -> None:
    problems = []
    if plan.lanes < 1 or plan.lanes % max(host_count, 1):
        problems.append(f"lanes={plan.lanes} must be a multiple of the {host_count} hosts")
    if batch_size < 1 or batch_size % max(plan.lanes, 1):
        problems.append(f"a batch of {batch_size} rows over all hosts must be a multiple of lanes={plan.lanes}")
    if not 0 <= host_index < host_count:
        problems.append(f"host_index={host_index} must lie in [0, {host_count})")
    if endless and plan.total < plan.lanes:
        problems.append(f"{plan.total} samples are fewer than lanes={plan.lanes}")
    if problems:
        raise ValueError("the data cannot be split: " + "; ".join(problems))
