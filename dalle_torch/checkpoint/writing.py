"""One checkpoint on its way to disk: who writes what, the writing, and the commit.

Owns: the steps of a save and their order. Does not own: when they are taken, and the meetings of processes (`sharded`).

The tensors' parts go to files `__PROCESS_0.distcp` as torch.distributed.checkpoint writes them. Beside them lie
`meta.json`, and of each process `host-00000.json` with what it wrote and was given, which it writes last. Process 0
reads them all back, compares, adds torch's own table `.metadata`, and then `committed.json`, which makes the folder a
checkpoint: on a local disk the folder gets its name only now, elsewhere this file is what counts.
"""

import hashlib
import json
import pickle
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dalle_torch.checkpoint.cutting import Cutter
from dalle_torch.checkpoint.index import Stack, check, shapes_in, shapes_of, table, to_metadata
from dalle_torch.checkpoint.reading import FORMAT, MARKER, META_FILE, METADATA_FILE, host_file, is_small, parsed
from dalle_torch.checkpoint.store import Store
from dalle_torch.storage import CheckpointError

PATIENCE = 1800.0
"""Seconds that process 0 waits for the other processes' parts of an asynchronous save."""
_POLL = 0.05, 2.0


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is written, as process 0 has chosen it."""

    step: int
    folder: str
    """While it is written."""
    final: str
    """Once it is committed."""
    save: str
    """Name of the attempt, which nothing that another one left behind can have."""


@dataclass(frozen=True)
class Offer:
    """What a process could write: it goes to all others, so it is small."""

    place: Place | None
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    parts: list[tuple[str, tuple[int, ...], int]]
    """Name, offsets and bytes of each part of a tensor that it holds."""


class Save:
    """The part of one process in a save.

    Attributes:
        place: where to, once processes have agreed.
        committed: whether what lies there may be a checkpoint already, and must not be removed.

    Raises:
        ValueError: something among the tensors is not one, or the JSON parts cannot be written as JSON.
    """

    def __init__(
        self,
        store: Store,
        host: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        own: Mapping[str, Any],
        stacks: Sequence[Stack] = (),
    ) -> None:
        strangers = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if strangers:
            raise ValueError(f"a checkpoint holds tensors, and these are none: {', '.join(strangers)}")
        self.store, self.host = store, host
        self._meta, self._own = _json(dict(meta), "meta"), _json(dict(own), "host_meta")
        self._shapes = shapes_of(tensors) | shapes_in(stacks)
        cutter = Cutter(tensors, stacks)
        self._planner: Any = cutter
        self._items = [item for item in cutter.items if self._counts(item)]
        self._names: set[str] = set()
        self.place = Place(0, "", "", "")
        self.committed = False

    def _counts(self, item: Any) -> bool:
        from torch.distributed.checkpoint.planner import WriteItemType

        if item.type == WriteItemType.TENSOR:  # replicated
            return self.host == 0
        # A process whose share of a tensor is empty has nothing to write.
        return _numbers_in(item) > 0 or (self.host == 0 and 0 in self._shapes[item.index.fqn][1])

    def offer(self, place: Place | None) -> Offer:
        parts = [(item.index.fqn, tuple(item.index.offset), _bytes_in(item)) for item in self._items]
        return Offer(place, self._shapes, parts)

    def agree(self, offers: Sequence[Offer]) -> None:
        """Settle which of its parts this process writes.

        Raises:
            ValueError: tensors of the same name differ between processes.
        """
        assert offers[0].place is not None
        self.place = offers[0].place
        shapes: dict[str, Any] = {}
        for offer in offers:
            differ = [name for name, shape in offer.shapes.items() if shapes.setdefault(name, shape) != shape]
            if differ:
                raise ValueError(f"processes have other shapes or dtypes of {', '.join(differ)}: nothing is saved")
        self._names = set(shapes)
        mine = share_out([offer.parts for offer in offers])[self.host]
        self._items = [item for item in self._items if (item.index.fqn, tuple(item.index.offset)) in mine]

    def stage(self) -> None:
        """Copy to the host's memory what this process writes, so that the tensors may change."""
        self._planner = _Staged({_key(item): _contiguous(self._planner.resolve_data(item)) for item in self._items})

    def write(self) -> None:
        """Write this process's files, the one that says so last."""
        try:
            parts = self._write_parts() if self._items else []
            if self.host == 0:
                self.store.write(self.place.folder, META_FILE, self._meta)
            names = {part[0] for part in parts}
            record = {
                "save": self.place.save,
                "meta": json.loads(self._own),
                "tensors": {name: shape for name, shape in self._shapes.items() if name in names},
                "parts": parts,
            }
            self.store.write(self.place.folder, host_file(self.host), json.dumps(record).encode())
        except BaseException:
            with suppress(Exception):  # what failed is told by this process itself; this is for process 0 alone
                self.store.write(self.place.folder, _failed(self.host), b"")
            raise
        finally:
            self._planner = None  # and with it the copies

    def _write_parts(self) -> list[Any]:
        from torch.distributed.checkpoint.planner import SavePlan

        # torch's own writer does what torch warns of; a filter of its own would not be safe in a thread.
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, "torch.distributed.checkpoint")
        writer = self.store.writer(self.place.folder)
        writer.set_up_storage_writer(self.host == 0)
        # The writer names files after the place of a plan among those of all processes.
        plans = [SavePlan([])] * self.host + [SavePlan(self._items)]
        plan = writer.prepare_global_plan(plans)[self.host]
        written = writer.write_data(plan, _Whole(self._planner)).value()
        sizes = {_key(item): list(item.tensor_data.chunk.sizes) for item in self._items}
        return [
            [
                result.index.fqn,
                list(result.index.offset),
                sizes[result.index.fqn, tuple(result.index.offset)],
                result.storage_data.relative_path,
                result.storage_data.offset,
                result.storage_data.length,
            ]
            for result in written
        ]

    def wait_for_others(self, count: int) -> None:
        """Of process 0: until every process has written its files, as they themselves say.

        Raises:
            OSError: one has failed, or did not come to an end.
        """
        deadline, pause = time.monotonic() + PATIENCE, _POLL[0]
        while True:
            names = self.store.files(self.place.folder)
            failed = [index for index in range(count) if _failed(index) in names]
            if failed:
                raise OSError(f"process {failed[0]} of {count} could not write its part")
            missing = [index for index in range(count) if host_file(index) not in names]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {missing[:10]} of {count} have written nothing for {PATIENCE:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _POLL[1])

    def commit(self, count: int) -> None:
        """Of process 0, after all have written: read back, compare, and make the folder a checkpoint.

        Raises:
            CheckpointError: what lies there is not what was to be saved.
            OSError: it cannot be read or written.
        """
        store, folder = self.store, self.place.folder
        hosts = [parsed(store.read(folder, host_file(index)), host_file(index)) for index in range(count)]
        if any(host["save"] != self.place.save for host in hosts):
            raise CheckpointError(f"{store.url}/{folder} has files of another save")
        entries = table(hosts)
        check(entries, self._names, store.files(folder))
        store.write(folder, METADATA_FILE, pickle.dumps(to_metadata(entries, with_files=True)))
        files: dict[str, dict[str, Any]] = {}
        for name, size in sorted(store.files(folder).items()):
            files[name] = {"size": size}
            if is_small(name):
                files[name]["sha256"] = hashlib.sha256(store.read(folder, name)).hexdigest()
        marker = {
            "format": FORMAT,
            "step": self.place.step,
            "hosts": count,
            "tensors": len(entries),
            "save": self.place.save,
            "files": files,
        }
        # An error of a store does not mean that it has not done what it was told to.
        self.committed = folder == self.place.final
        store.write(folder, MARKER, json.dumps(marker, indent=1).encode())
        self.committed = True
        if folder != self.place.final:
            store.rename(folder, self.place.final)


def share_out(held: Sequence[Sequence[tuple[str, tuple[int, ...], int]]]) -> list[set[tuple[str, tuple[int, ...]]]]:
    """For each process, which of the parts that it holds it writes: each part once, where there is least so far."""
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    for process, parts in enumerate(held):
        for name, offsets, size in parts:
            holders.setdefault((name, offsets), []).append(process)
            sizes[name, offsets] = size
    shares: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in held]
    loads = [0] * len(held)
    for part, processes in holders.items():
        process = min(processes, key=lambda process: (loads[process], process))
        shares[process].add(part)
        loads[process] += sizes[part]
    return shares


@dataclass(frozen=True)
class _Staged:
    """Copies, in the place of a planner."""

    copies: dict[Any, Tensor] = field(repr=False)

    def resolve_data(self, item: Any) -> Tensor:
        return self.copies[_key(item)]


@dataclass(frozen=True)
class _Whole:
    """A planner whose tensors lie in memory in the order of their elements, as reading takes for granted."""

    planner: Any

    def resolve_data(self, item: Any) -> Tensor:
        return self.planner.resolve_data(item).detach().contiguous()


def _contiguous(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU."""
    import torch

    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor.detach())


def _key(item: Any) -> tuple[str, tuple[int, ...]]:
    return item.index.fqn, tuple(item.index.offset)


def _numbers_in(item: Any) -> int:
    return int(item.tensor_data.chunk.sizes.numel())


def _bytes_in(item: Any) -> int:
    return _numbers_in(item) * item.tensor_data.properties.dtype.itemsize


def _failed(host: int) -> str:
    return f"failed-{host:05d}"


def _json(value: dict[str, Any], what: str) -> bytes:
    try:
        return json.dumps(value, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} of a checkpoint has to be JSON: {error}") from error
