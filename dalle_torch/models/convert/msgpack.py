"""Reads the tensors of a Flax checkpoint (`flax_model.msgpack`) straight from the mapped file.

Owns: MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md) as far as Flax writes it
(`flax/serialization.py`), and every check that an untrusted file needs. Does not own: what the names mean.
The msgpack library would copy each payload into a bytes object and trust the lengths it reads; here a tensor is a view
on the file, and a length is believed only once it is known to fit.
"""

import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dalle_torch.storage import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    )
}  # fmt: skip
"""NumPy's name of a dtype -> torch's; other dtypes are refused."""

MAX_DEPTH = 32
"""Nested maps; the original's trees have 7."""
MAX_ENTRIES = 100_000
"""Map entries in a file; DALL·E Mega unstacked has about 1,000."""
MAX_NAME_BYTES = 512
"""Bytes of one name."""
MAX_DIMENSIONS = 8

CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_SIZES = {1: ">B", 2: ">H", 4: ">I"}
_INTEGERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}

Names = tuple[str, ...]


def read_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Stream the tensors of a Flax msgpack file in the order in which they are stored.

    A tensor is a read-only view on the mapped file: copy it, never write to it. When the next one is asked for, the
    pages of the last one are given back, so that walking through the file needs no more memory than its largest
    tensor; a tensor that is kept stays valid and is read from the file again when it is used. Arrays above 1 GiB,
    which Flax stores in pieces, are joined in memory.

    Args:
        path: the file.

    Yields:
        (names from the root of the tree down, tensor of the stored shape and dtype).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, malformed, not a tree of arrays, or exceeds the limits of this module;
            the message names the file and the place in the tree.
    """
    reader = _Reader(Path(path))
    yield from reader.tree((), 0)
    if reader.at != reader.size:
        reader.fail((), f"{reader.size - reader.at} bytes follow the end of the tree")


class _Reader:
    """A position in a mapped file; each method reads one thing there and moves past it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise CheckpointError(f"{path} is empty")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 0
        self.entries = 0

    def fail(self, where: Names, problem: str) -> NoReturn:
        place = f" at {'/'.join(where)!r}" if where else ""
        raise CheckpointError(f"{self.path} is not a usable Flax msgpack file: {problem}{place} (byte {self.at:,})")

    def take(self, count: int, where: Names) -> int:
        """Move past `count` bytes and return where they begin."""
        start = self.at
        if count > self.size - start:
            self.fail(where, f"{count:,} bytes are announced but {self.size - start:,} are left; is it truncated?")
        self.at = start + count
        return start

    def number(self, form: str, where: Names) -> int:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form), where))[0]

    def tree(self, where: Names, depth: int) -> Iterator[tuple[Names, Tensor]]:
        """The tensors of the map that begins here."""
        if depth > MAX_DEPTH:
            self.fail(where[:8], f"maps are nested more than {MAX_DEPTH} deep")
        tag = self.number(">B", where)
        count = self.map_length(tag, where)
        if count is None:
            self.fail(where, f"a map of names is expected, but the type byte is 0x{tag:02x}")
        names: set[str] = set()
        for _ in range(count):
            name = self.name(where)
            if name in names:
                self.fail((*where, name), "the name occurs twice")
            names.add(name)
            if name == CHUNKED:
                if len(names) > 1 or not where:
                    self.fail(where, f"{CHUNKED} is mixed with other entries")
                begin = self.at
                yield where, self.chunked(count, where)
                self.release(begin, self.at)
                return
            yield from self.entry((*where, name), depth)

    def entry(self, where: Names, depth: int) -> Iterator[tuple[Names, Tensor]]:
        tag = self.data[self.peek(where)]
        if self.is_map(tag):
            yield from self.tree(where, depth + 1)
            return
        begin = self.at
        yield where, self.array(where)
        self.release(begin, self.at)

    def peek(self, where: Names) -> int:
        position = self.take(1, where)
        self.at = position
        return position

    @staticmethod
    def is_map(tag: int) -> bool:
        return 0x80 <= tag <= 0x8F or tag in (0xDE, 0xDF)

    def map_length(self, tag: int, where: Names) -> int | None:
        """Entries of a map whose type byte has been read, or None where it is no map."""
        if not self.is_map(tag):
            return None
        count = tag & 0x0F if tag <= 0x8F else self.number(">H" if tag == 0xDE else ">I", where)
        self.entries += count
        # The shortest entry is a name of one byte and a value of one byte.
        if 2 * count > self.size - self.at:
            self.fail(where, f"a map of {count:,} entries does not fit into the file; is it truncated?")
        if self.entries > MAX_ENTRIES:
            self.fail(where, f"there are more than {MAX_ENTRIES:,} entries")
        return count

    def name(self, where: Names) -> str:
        tag = self.number(">B", where)
        if 0xA0 <= tag <= 0xBF:
            length = tag & 0x1F
        elif 0xD9 <= tag <= 0xDB:
            length = self.number(_SIZES[1 << (tag - 0xD9)], where)
        else:
            self.fail(where, f"a name is expected, but the type byte is 0x{tag:02x}")
        if length > MAX_NAME_BYTES:
            self.fail(where, f"a name of {length:,} bytes is longer than {MAX_NAME_BYTES}")
        start = self.take(length, where)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(where, "a name is not UTF-8")

    def array(self, where: Names) -> Tensor:
        """The tensor packed in the extension type that begins here."""
        tag = self.number(">B", where)
        if 0xD4 <= tag <= 0xD8:
            length = 1 << (tag - 0xD4)
        elif 0xC7 <= tag <= 0xC9:
            length = self.number(_SIZES[1 << (tag - 0xC7)], where)
        else:
            self.fail(where, f"a tensor is expected, but the type byte is 0x{tag:02x}")
        code = self.number(">b", where)
        if code == _COMPLEX:
            self.fail(where, "a complex number is stored where a tensor is expected")
        if code not in (_NDARRAY, _SCALAR):
            self.fail(where, f"extension type {code} is not one of Flax")
        end = self.take(length, where) + length
        self.at = end - length
        tensor = self.payload(where)
        if self.at != end:
            self.fail(where, f"the tensor takes {self.at - end + length:,} bytes, but {length:,} are announced")
        return tensor

    def payload(self, where: Names) -> Tensor:
        """[shape, dtype's name, bytes in row-major order], as Flax packs an array."""
        if self.number(">B", where) != 0x93:
            self.fail(where, "a tensor must be packed as shape, dtype and bytes")
        tag = self.number(">B", where)
        if not 0x90 <= tag <= 0x9F or tag & 0x0F > MAX_DIMENSIONS:
            self.fail(where, f"a shape of at most {MAX_DIMENSIONS} dimensions is expected")
        shape = tuple(self.dimension(where) for _ in range(tag & 0x0F))
        dtype_name = self.name(where)
        if dtype_name not in DTYPES:
            self.fail(where, f"dtype {dtype_name[:32]!r} is not one of {', '.join(DTYPES)}")
        tag = self.number(">B", where)
        if not 0xC4 <= tag <= 0xC6:
            self.fail(where, f"a tensor's bytes are expected, but the type byte is 0x{tag:02x}")
        length = self.number(_SIZES[1 << (tag - 0xC4)], where)
        dtype, elements = DTYPES[dtype_name], math.prod(shape)
        if elements * dtype.itemsize != length:
            self.fail(where, f"shape {list(shape)} of {dtype_name} does not take the {length:,} bytes that are stored")
        start = self.take(length, where)
        with warnings.catch_warnings():
            # The view cannot be written to, which is what torch warns of and what we want.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self.data, dtype=dtype, count=elements, offset=start).view(shape)

    def dimension(self, where: Names) -> int:
        """One size of a shape; sizes of zero are refused, since torch cannot tell an empty view's place."""
        tag = self.number(">B", where)
        if tag in _INTEGERS:
            size = self.number(_INTEGERS[tag], where)
        elif tag <= 0x7F:
            size = tag
        else:
            self.fail(where, f"a size is expected in a shape, but the type byte is 0x{tag:02x}")
        if size < 1:
            self.fail(where, f"a shape holds the size {size}")
        return size

    def chunked(self, count: int, where: Names) -> Tensor:
        """The array that Flax stored in flat pieces; the marker's name has just been read."""
        if count != 3:
            self.fail(where, f"a chunked array has 3 entries, not {count}")
        if self.number(">B", where) not in (0xC3, 0x01):
            self.fail(where, f"{CHUNKED} is not true")
        parts: dict[str, list[Any]] = {}
        for _ in range(2):
            name = self.name(where)
            if name not in ("shape", "chunks") or name in parts:
                self.fail(where, f"{name!r} does not belong into a chunked array")
            parts[name] = self.numbered(name, where)
        shape, chunks = parts["shape"], parts["chunks"]
        if len({chunk.dtype for chunk in chunks}) != 1 or any(chunk.dim() != 1 for chunk in chunks):
            self.fail(where, "the pieces of a chunked array must be flat and of one dtype")
        if math.prod(shape) != sum(chunk.numel() for chunk in chunks):
            self.fail(where, f"the pieces of a chunked array do not add up to shape {shape}")
        return torch.cat(chunks).view(shape)

    def numbered(self, kind: str, where: Names) -> list[Any]:
        """A map "0", "1", ... of sizes (`kind` "shape") or of arrays ("chunks"), as a list."""
        where = (*where, kind)
        count = self.map_length(self.number(">B", where), where)
        if not count or (kind == "shape" and count > MAX_DIMENSIONS):
            self.fail(where, "a chunked array needs its sizes and pieces as a map of numbers")
        found: list[Any] = []
        for i in range(count):
            if self.name(where) != str(i):
                self.fail(where, f"entry {i} of a chunked array is missing")
            found.append(self.dimension(where) if kind == "shape" else self.array(where))
        return found

    def release(self, begin: int, end: int) -> None:
        """Let the system take back the pages that lie wholly between two positions."""
        page = mmap.PAGESIZE
        first, last = -(-begin // page) * page, end // page * page
        if last > first and hasattr(self.data, "madvise"):
            self.data.madvise(mmap.MADV_DONTNEED, first, last - first)
