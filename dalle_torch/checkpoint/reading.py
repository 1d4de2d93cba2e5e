"""A committed checkpoint: opened only if it is whole, and read into tensors of any layout.

Owns: the names of its files, the checks, the way from bytes to tensors. Does not own: which checkpoint is taken
(`sharded`), writing (`writing`).

Parts of tensors are zip archives, as torch.save writes them, with the numbers uncompressed in one record. They are read
as such, with their checksums; the pickle beside them, which says what the table says too, is not touched.
"""

import hashlib
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from dalle_torch.checkpoint.index import Entry, Part, Stack, check, differences, table, to_metadata
from dalle_torch.checkpoint.store import Store
from dalle_torch.parallel.loading import load_planner
from dalle_torch.storage import CheckpointError

FORMAT = 1
MARKER, META_FILE, METADATA_FILE = "committed.json", "meta.json", ".metadata"
_HOST_FILE = "host-{:05d}.json"
_OURS = re.compile(r"__\d+_\d+\.distcp|host-\d{5}\.json|failed-\d{5}|committed\.json|meta\.json|\.metadata|\..*tmp.*")


def host_file(index: int) -> str:
    return _HOST_FILE.format(index)


def is_small(name: str) -> bool:
    """Whether the file holds no tensors, and has its hash in the marker."""
    return not name.endswith(".distcp")


def only_ours(names: Iterable[str]) -> bool:
    """Whether a folder has nothing but what a checkpoint is made of."""
    return all(_OURS.fullmatch(name) for name in names)


class Checkpoint:
    """A whole checkpoint.

    Attributes:
        step: number of updates that it is of.
        url: its folder.
        meta: what process 0 gave to be saved.
        host_metas: what each process gave, in their order.
        shapes, dtypes: of each tensor.

    Raises:
        CheckpointError: it is not committed, or something of it is missing, cut or changed; the message says what.
        OSError: it cannot be read.
    """

    def __init__(self, store: Store, folder: str, barrier: Callable[[], None] = lambda: None) -> None:
        self._store, self._folder, self._barrier = store, folder, barrier
        self.url = f"{store.url}/{folder}"
        marker = check_files(store, folder)
        small = {name: self._checked(name, entry) for name, entry in marker["files"].items() if is_small(name)}
        try:
            self.step = int(marker["step"])
            self.meta: dict[str, Any] = small[META_FILE]
            hosts = [small[host_file(index)] for index in range(marker["hosts"])]
            self.host_metas: list[dict[str, Any]] = [host["meta"] for host in hosts]
            sizes = {name: entry["size"] for name, entry in marker["files"].items()}
            names = marker["tensors"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.url}: {error!r} is not as it should be in its JSON files") from error
        self._entries: dict[str, Entry] = table(hosts)
        if len(self._entries) != names:
            raise CheckpointError(f"{self.url} has {len(self._entries)} tensors, and {names} were saved")
        check(self._entries, self._entries, sizes)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}

    def load(self, into: Mapping[str, Tensor], stacks: Sequence[Stack] = ()) -> None:
        """Read all tensors in place, each process what it holds of them; every process has to call it.

        Beside what is loaded into, no more is in the host's memory at any time than one of `into` and `stacks`, as far
        as this process holds it, and one saved part of it, packed and unpacked.

        Args:
            into: of the same names, shapes and dtypes as were saved, laid out as wanted, also over another number of
                processes or devices.
            stacks: tensors in which the rest of what was saved lies together.

        Raises:
            CheckpointError: they do not fit, and nothing was changed; or a file was damaged after it was written.
            OSError: a file cannot be read.
        """
        if problems := differences(self._entries, into, stacks):
            raise CheckpointError(f"{self.url} does not fit: {'; '.join(problems)}")
        joined = {f"stack {number} of {', '.join(stack.names[:1])}": stack for number, stack in enumerate(stacks)}
        self._fill(
            {**into, **{key: stack.tensor for key, stack in joined.items()}},
            {name: self._entries[name] for name in into}
            | {key: stack.joined(self._entries) for key, stack in joined.items()},
        )
        self._barrier()

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Whole tensors on the CPU, by this process alone.

        Args:
            names: those wanted; `None` is all.

        Raises:
            CheckpointError: a name is unknown, or a file was damaged after it was written.
            OSError: a file cannot be read.
        """
        wanted = list(self._entries if names is None else names)
        if unknown := [name for name in wanted if name not in self._entries]:
            raise CheckpointError(f"{self.url} does not have {', '.join(unknown)}")
        entries = {name: self._entries[name] for name in wanted}
        tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
        self._fill(tensors, entries)
        return tensors

    def _fill(self, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> None:
        parts = {(name, part.offsets): part for name, entry in entries.items() for part in entry.parts}
        planner: Any = load_planner(tensors, to_metadata(entries))
        by_part: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
        for item in planner.create_local_plan().items:
            index = item.storage_index
            by_part.setdefault((index.fqn, tuple(index.offset)), []).append(item)
        # Tensor by tensor, since torch_xla's are put together in the host's memory; in each, in the files' order.
        order = {name: number for number, name in enumerate(entries)}
        for key in sorted(by_part, key=lambda key: (order[key[0]], parts[key].file, parts[key].start)):
            self._read_part(parts[key], entries[key[0]].dtype, by_part[key], planner)

    def _read_part(self, part: Part, dtype: torch.dtype, items: Sequence[Any], planner: Any) -> None:
        """Take a part to where `items` want pieces of it."""
        content = self._store.read(self._folder, part.file, part.start, part.start + part.length)
        where = f"{self.url}/{part.file}: {part.tensor}"
        target = planner.resolve_tensor(items[0]).detach()
        whole = len(items) == 1 and tuple(items[0].lengths) == part.sizes
        if whole and target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            _unpack(content, target, where)
            planner.commit_tensor(items[0], target)
            return
        block = torch.empty(part.sizes, dtype=dtype)
        _unpack(content, block, where)
        del content
        for item in items:
            source = block
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                source = source.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
            planner.commit_tensor(item, target)

    def _checked(self, name: str, entry: Mapping[str, Any]) -> Any:
        content = self._store.read(self._folder, name)
        if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
            raise CheckpointError(f"{self.url}: {name} is not what was written")
        return parsed(content, f"{self.url}/{name}") if name.endswith(".json") else None


def check_files(store: Store, folder: str) -> dict[str, Any]:
    """The marker of a checkpoint all of whose files are there with their sizes.

    Raises:
        CheckpointError: it was not committed, is of another format, or files are missing or of other sizes.
    """
    sizes = store.files(folder)
    if MARKER not in sizes:
        raise CheckpointError(f"{store.url}/{folder} was never finished: it has no {MARKER}")
    marker = parsed(store.read(folder, MARKER), f"{store.url}/{folder}/{MARKER}")
    if marker.get("format") != FORMAT:
        raise CheckpointError(
            f"{store.url}/{folder} has format {marker.get('format')!r}, and this version of dalle_torch reads {FORMAT}"
        )
    try:
        problems = [
            f"{name} is missing" if name not in sizes else f"{name} has {sizes[name]} bytes, not {entry['size']}"
            for name, entry in marker["files"].items()
            if sizes.get(name) != entry["size"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{store.url}/{folder}/{MARKER} is malformed: {error!r}") from error
    if problems:
        raise CheckpointError(f"{store.url}/{folder} is not whole: {'; '.join(problems[:20])}")
    return marker


def parsed(content: bytes, where: str) -> dict[str, Any]:
    """The object in JSON text. Raises CheckpointError: there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds no JSON object")
    return value


def _unpack(content: bytes, block: Tensor, where: str) -> None:
    """Fill `block`, contiguous and on the CPU, with the numbers that torch.save wrote, without its pickle."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            order = archive.read(_record(archive, "/byteorder")).decode()
            with archive.open(_record(archive, "/data/0")) as numbers:
                size = _read_into(block, numbers)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, UnicodeError) as error:
        raise CheckpointError(f"{where} is damaged: {str(error) or type(error).__name__}") from error
    if order != sys.byteorder:
        raise CheckpointError(f"{where} was written on a machine of {order}-endian numbers: load it on such a one")
    if size != block.nbytes:
        raise CheckpointError(f"{where} has {size} bytes where {block.nbytes} are due")


def _record(archive: zipfile.ZipFile, ending: str) -> zipfile.ZipInfo:
    found = [info for info in archive.infolist() if info.filename.endswith(ending)]
    if len(found) != 1:
        raise KeyError(f"{len(found)} records {ending}")
    return found[0]


def _read_into(block: Tensor, numbers: IO[bytes]) -> int:
    """Fill `block`; returns how many bytes there were. Raises BadZipFile: their checksum is another."""
    place = memoryview(block.reshape(-1).view(torch.uint8).numpy()) if block.numel() else memoryview(bytearray())
    size = 0
    while size < len(place) and (read := numbers.readinto(place[size:])):  # type: ignore[attr-defined]
        size += read
    # The checksum is compared where the end is seen.
    return size + len(numbers.read())
