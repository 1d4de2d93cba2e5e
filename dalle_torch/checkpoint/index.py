"""Which tensors a checkpoint has, and where the parts of each lie: what the processes' JSON files say, checked.

Owns: the table of tensors, its way to JSON and to the metadata of torch.distributed.checkpoint, what does not fit.
Does not own: files.

torch.distributed.checkpoint keeps such a table as a pickle, `.metadata`. One is written for its own tools, and never
read here: a pickle can run any code.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dalle_torch.storage import CheckpointError

DTYPES = {
    str(value).removeprefix("torch."): value
    for name in dir(torch)
    if isinstance(value := getattr(torch, name), torch.dtype) and not name.startswith(("q", "bits"))
}


@dataclass(frozen=True)
class Part:
    """A block of a tensor, and the bytes in which torch.save wrote it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    tensor: str = ""
    """Which one it is of, as it was saved."""


@dataclass(frozen=True)
class Stack:
    """A tensor in which named ones lie one after the other, along its first dimension.

    Attributes:
        tensor: [N, ...], on any devices; rows behind the last name's belong to none.
        names: in their order.
        rows: of each name; 0: one, and the tensor of that name is without this dimension.
    """

    tensor: Tensor
    names: Sequence[str]
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor of each name."""
        bare = tuple(map(int, self.tensor.shape[1:]))
        return (self.rows, *bare) if self.rows else bare

    def joined(self, entries: Mapping[str, "Entry"]) -> "Entry":
        """Where the parts of `tensor` lie, from where those of the names do."""
        found = Entry(self.tensor.dtype, tuple(map(int, self.tensor.shape)))
        for number, name in enumerate(self.names):
            for part in entries[name].parts:
                if self.rows:
                    offsets, sizes = (number * self.rows + part.offsets[0], *part.offsets[1:]), part.sizes
                else:
                    offsets, sizes = (number, *part.offsets), (1, *part.sizes)
                found.parts.append(replace(part, offsets=offsets, sizes=sizes))
        return found

    def cut(
        self, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
        """The parts of names' tensors in a block of `tensor`: name, offsets and sizes there, first row in the block."""
        rows = self.rows or 1
        first = offsets[0]
        end = min(first + sizes[0], rows * len(self.names))
        # A block that ends where it begins, or lies behind the last name, has nothing.
        for number in range(first // rows, -(-end // rows)) if first < end else ():
            start, stop = max(first, number * rows), min(end, (number + 1) * rows)
            if self.rows:
                within = (start - number * rows, *offsets[1:]), (stop - start, *sizes[1:])
            else:
                within = offsets[1:], sizes[1:]
            yield self.names[number], *within, start - first


@dataclass(frozen=True)
class Entry:
    """A tensor and its parts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[Part] = field(default_factory=list)

    def covered(self) -> bool:
        """Whether every element is in one part and none in two."""
        for part in self.parts:
            reach = zip(part.offsets, part.sizes, self.shape, strict=False)
            if not len(part.offsets) == len(part.sizes) == len(self.shape):
                return False
            if any(offset < 0 or size < 0 or offset + size > bound for offset, size, bound in reach):
                return False
        if sum(math.prod(part.sizes) for part in self.parts) != math.prod(self.shape) or not self.parts:
            return False
        return not _overlap(self.parts)


def _overlap(parts: list[Part]) -> bool:
    """Whether two blocks have an element in common."""
    if not parts[0].sizes:
        return len(parts) > 1
    # Swept along the first dimension: only those blocks are compared that reach over the same row.
    open_parts: list[Part] = []
    for part in sorted((part for part in parts if math.prod(part.sizes)), key=lambda part: part.offsets[0]):
        open_parts = [other for other in open_parts if other.offsets[0] + other.sizes[0] > part.offsets[0]]
        for other in open_parts:
            if all(
                a < b + size_b and b < a + size_a
                for a, size_a, b, size_b in zip(part.offsets, part.sizes, other.offsets, other.sizes, strict=True)
            ):
                return True
        open_parts.append(part)
    return False


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape of the whole tensor)."""
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(map(int, tensor.shape)))
        for name, tensor in tensors.items()
    }


def shapes_in(stacks: Iterable[Stack]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same of the tensors that lie in stacks."""
    return {
        name: (str(stack.tensor.dtype).removeprefix("torch."), stack.shape) for stack in stacks for name in stack.names
    }


def table(hosts: Iterable[Mapping[str, Any]]) -> dict[str, Entry]:
    """What the processes' files (`tensors` and `parts`) say together.

    Raises:
        CheckpointError: they are malformed or contradict each other.
    """
    found: dict[str, Entry] = {}
    try:
        for host in hosts:
            for name, (dtype, shape) in host["tensors"].items():
                entry = Entry(DTYPES[dtype], _numbers(shape))
                if found.setdefault(name, entry) != entry and (found[name].dtype, found[name].shape) != (
                    entry.dtype,
                    entry.shape,
                ):
                    raise CheckpointError(f"tensor {name} has two shapes or dtypes")
            for name, offsets, sizes, file, start, length in host["parts"]:
                if not isinstance(file, str) or "/" in file or "\\" in file:
                    raise CheckpointError(f"tensor {name} lies in {file!r}, which is no file of a checkpoint")
                start, length = _numbers([start, length])
                found[name].parts.append(Part(_numbers(offsets), _numbers(sizes), file, start, length, name))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"its table of tensors is malformed ({type(error).__name__}: {error})") from error
    return found


def _numbers(values: Any) -> tuple[int, ...]:
    if any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{values!r:.60} are no sizes")
    return tuple(values)


def check(entries: Mapping[str, Entry], names: Iterable[str], sizes: Mapping[str, int]) -> None:
    """That just the tensors `names` are there, whole, in files as long as `sizes` says.

    Raises:
        CheckpointError: something is not so; all of it is named.
    """
    wanted = set(names)
    problems = [f"tensor {name} is missing" for name in sorted(wanted - entries.keys())]
    problems += [f"tensor {name} was not to be there" for name in sorted(entries.keys() - wanted)]
    for name, entry in entries.items():
        if not entry.covered():
            problems.append(f"the parts of {name} do not make up its shape {list(entry.shape)}")
        short = {part.file for part in entry.parts if part.start + part.length > sizes.get(part.file, -1)}
        problems += [f"{file} ends before {name} does" for file in sorted(short)]
    if problems:
        raise CheckpointError(_listed(problems))


def differences(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor], stacks: Sequence[Stack] = ()) -> list[str]:
    """Why a checkpoint does not fit tensors that it is to be loaded into."""
    wanted = shapes_of(tensors) | shapes_in(stacks)
    problems = [f"{name} is missing in it" for name in wanted if name not in entries]
    problems += [f"{name} is unknown here" for name in entries if name not in wanted]
    for name, (dtype, shape) in wanted.items():
        entry = entries.get(name)
        if entry is not None and entry.shape != shape:
            problems.append(f"{name} has shape {list(entry.shape)}, expected {list(shape)}")
        elif entry is not None and entry.dtype != DTYPES[dtype]:
            problems.append(f"{name} is {str(entry.dtype).removeprefix('torch.')}, expected {dtype}")
    return problems


def to_metadata(entries: Mapping[str, Entry], *, with_files: bool = False) -> Any:
    """As torch.distributed.checkpoint has it; `with_files` for its own readers."""
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    state, storage = {}, {}
    for name, entry in entries.items():
        chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in entry.parts]
        state[name] = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), chunks)
        for number, part in enumerate(entry.parts):
            storage[MetadataIndex(name, part.offsets, number)] = _StorageInfo(part.file, part.start, part.length)
    return Metadata(
        state_dict_metadata=state,
        planner_data={name: (name,) for name in entries},
        storage_data=storage if with_files else None,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )


def _listed(problems: list[str], most: int = 20) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
