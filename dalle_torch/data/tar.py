"""Samples out of a tar archive, fast and without trusting it.

A sample is a run of files that share their name up to the first dot: "a/7.jpg" and "a/7.txt" are the members "jpg" and
"txt" of the sample "a/7" (the webdataset convention). A file whose name has no dot, or one that is too long, makes a
sample that must not be used; hidden files and names that begin with two underscores are passed over, as are links,
devices and folders. Files are read only if a limit is given for their extension, and only up to it.

Owns: headers (ustar, GNU long names, pax paths and sizes), grouping, damage. Does not own: what members hold. Python's
`tarfile` takes several times longer for a header, which is most of the work where samples are a kilobyte.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Final

BLOCK: Final = 512
CHUNK: Final = 1 << 20
MAX_HEADER: Final = 1 << 16
"""Longest name or pax header that is read."""
MAX_KEY: Final = 1024
"""Characters of a sample's name."""

BAD_NAME: Final = "bad_name"
DUPLICATE: Final = "duplicate_key"
TOO_LARGE: Final = "member_too_large"

_FILES = (0x30, 0x00, 0x37)
_ZEROS = bytes(BLOCK)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class TarDamage(ValueError):
    """The archive cannot be read from here on."""


@dataclass(slots=True)
class TarSample:
    """One sample: `members` by extension in lower case; `problem` is set where it must not be used."""

    key: str
    offset: int
    """Where its first header begins."""
    members: dict[str, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    """Extensions of all its files, those not read included."""
    problem: str | None = None


class TarReader:
    """Reads samples one after another, from any offset at which one begins.

    Args:
        file: seekable, or `size` bytes long from where it stands.
        size: bytes of the archive.
        limits: extension -> most bytes of a member; extensions that are not named are not read.
    """

    def __init__(self, file: BinaryIO, size: int, limits: Mapping[str, int]) -> None:
        self.file = file
        self.size = size
        self.limits = limits
        self._buffer = b""
        self._start = 0  # of the buffer, in the archive
        self._at = 0
        self._whole = False  # whether the last member could be taken or skipped

    def samples(self, offset: int = 0) -> Iterator[TarSample]:
        """The samples from `offset` on.

        Raises:
            TarDamage: after the last sample that could be read; the archive is cut off, corrupt or no tar at all.
        """
        self._at = offset
        self._refill(BLOCK)
        current: TarSample | None = None
        current_name = ("", "")
        try:
            for start, name, size in self._headers():
                base, _, file_name = name.rpartition("/")
                stem, dot, extension = file_name.partition(".")
                if not stem or stem.startswith("__"):
                    self._skip(size)
                    continue
                key = f"{base}/{stem}" if base else stem
                if current is None or (key, dot) != current_name:
                    done, current = current, None
                    if done is not None:
                        yield done
                    current_name = (key, dot)
                    current = TarSample(key, start)
                    if not dot or len(key) > MAX_KEY:
                        current.key, current.problem = key[:MAX_KEY], BAD_NAME
                if current.problem == BAD_NAME:
                    self._skip(size)
                else:
                    self._read_member(current, extension.lower(), size)
        except TarDamage:
            # A member that was cut off takes its sample with it.
            if current is not None and current.problem is None and self._whole:
                yield current
            raise
        if current is not None:
            yield current

    def _read_member(self, sample: TarSample, extension: str, size: int) -> None:
        limit = self.limits.get(extension)
        self._whole = False
        if extension in sample.seen:
            sample.problem = DUPLICATE
        sample.seen.append(extension)
        if limit is None:
            self._skip(size)
        elif size > limit:
            sample.problem = TOO_LARGE
            self._skip(size)
        else:
            sample.members[extension] = self._take(size)
        self._whole = True

    def _headers(self) -> Iterator[tuple[int, str, int]]:
        """(offset, name, size) of every plain file; its content must be taken or skipped before going on."""
        long_name, pax, first = "", {}, -1
        while True:
            if first < 0:
                first = self._at
            if self._at == self.size and self._at:
                raise TarDamage("it ends without the mark of its end")
            header = self._bytes(BLOCK)
            if header == _ZEROS:
                return
            kind, size = header[156], _checked_size(header, self._at - BLOCK)
            if kind == 0x4C:
                long_name = _text(self._bounded(size, self._at)).rstrip("\0")
                continue
            if kind == 0x78:
                pax = _pax(self._bounded(size, self._at))
                continue
            name = pax.get("path") or long_name or _header_name(header)
            if "size" in pax:
                size = _number(pax["size"], self._at)
            if kind in _FILES:
                yield first, name, size
            else:
                self._skip(size)
            long_name, pax, first = "", {}, -1

    def _bounded(self, size: int, at: int) -> bytes:
        if size > MAX_HEADER:
            raise TarDamage(f"the header at byte {at:,} announces a name of {size:,} bytes")
        return self._take(size)

    def _take(self, size: int) -> bytes:
        """The next `size` bytes; the padding behind them is passed over."""
        data = self._bytes(size)
        self._skip(-size % BLOCK, padding=True)
        return data

    def _bytes(self, size: int) -> bytes:
        begin = self._at - self._start
        end = begin + size
        if end > len(self._buffer):
            self._refill(size)
            begin, end = 0, size
            if end > len(self._buffer):
                raise TarDamage(f"it is cut off at byte {self._start + len(self._buffer):,}")
        self._at += size
        return self._buffer[begin:end]

    def _skip(self, size: int, *, padding: bool = False) -> None:
        if not padding:
            size += -size % BLOCK
        if self._at + size > self.size:
            raise TarDamage(f"it is cut off at byte {self.size:,}")
        self._at += size

    def _refill(self, size: int) -> None:
        """Have the buffer begin at the current place and hold `size` bytes, if the archive has them."""
        kept = self._buffer[self._at - self._start :] if self._at >= self._start else b""
        wanted = self._at + len(kept)
        if not (kept or (self._buffer and wanted == self._start + len(self._buffer))):
            self.file.seek(wanted)
        parts, length = [kept], len(kept)
        while length < size or length < CHUNK:
            data = self.file.read(max(CHUNK, size - length))
            if not data:
                break
            parts.append(data)
            length += len(data)
        self._buffer = b"".join(parts)
        self._start = self._at


def count_samples(file: BinaryIO, size: int) -> tuple[int, TarDamage | None]:
    """How many samples an archive has, by its headers alone, and what cut the count short."""
    count = 0
    try:
        for _ in TarReader(file, size, {}).samples():
            count += 1
    except TarDamage as damage:
        return count, damage
    return count, None


def _checked_size(header: bytes, at: int) -> int:
    """The size that a header announces.

    Raises:
        TarDamage: its checksum is wrong.
    """
    stored = header[148:156]
    try:
        expected = int(stored.rstrip(b"\0 ").lstrip(b" ") or b"-1", 8)
    except ValueError:
        expected = -1
    if sum(header) - sum(stored) + 8 * 0x20 != expected:
        packed = _COMPRESSED.get(header[:2]) if at == 0 else None
        raise TarDamage(f"it is compressed with {packed}; unpack it first" if packed else f"no header at byte {at:,}")
    field = header[124:136]
    if field[0] & 0x80:
        return _number(int.from_bytes(field[1:], "big"), at)
    return _number(field.rstrip(b"\0 ").lstrip(b" ") or b"0", at)


def _number(value: bytes | str | int, at: int) -> int:
    try:
        number = int(value, 8) if isinstance(value, bytes) else int(value)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 50:
        raise TarDamage(f"the header at byte {at:,} announces a size that is no number")
    return number


def _header_name(header: bytes) -> str:
    name = _text(header[:100].partition(b"\0")[0])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500].partition(bytes(1))[0])}/{name}"
    return name


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _pax(data: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n"; what is malformed ends them."""
    found = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        length = data[at:space]
        if space < 0 or not length.isdigit() or not int(length):
            break
        key, _, value = data[space + 1 : at + int(length) - 1].partition(b"=")
        found[_text(key)] = _text(value)
        at += int(length)
    return found
