"""Captioned pictures as they come: webdataset tars, parquet files with image bytes, a folder with `metadata.jsonl`.

Owns: splitting the input into parts (each becomes one shard), reading a part, which caption a sample has, and the
reasons for which a sample is left out before its picture is decoded. Does not own: decoding (`images`), encoding.
"""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Final, Protocol

from dalle_torch.data.captions import (
    BAD_JSON,
    CAPTION_KEYS,
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    KeyWatch,
    first_of,
    json_object,
    plain_fields,
    read_caption,
    safe_key,
)
from dalle_torch.data.images import EXTENSIONS, MAX_BYTES
from dalle_torch.data.parquet import (
    ParquetDamage,
    check_columns,
    opened_parquet,
    plain_columns,
    python_rows,
    row_batches,
)
from dalle_torch.data.part_names import distinct_names, place
from dalle_torch.data.picture_folder import METADATA, image_folder, is_file_name, lines_of
from dalle_torch.data.shards import Shard, file_system, find_shards, open_shard, readable
from dalle_torch.data.tar import DUPLICATE, TOO_LARGE, TarDamage, TarReader

NO_IMAGE: Final = "no_image"
SHARD_DAMAGED: Final = "shard_damaged"

_PROBED = 200
_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_BYTES_A_PICTURE = 100_000
"""What a picture counts in a folder, whose files are not looked at before their turn."""


class FileTooLarge(ValueError):
    """A picture's file that is not read."""


@dataclass(slots=True)
class RawSample:
    """A picture as it was stored, with its caption."""

    key: str
    image: bytes | Callable[[], bytes]
    """The file, or what reads it (raising OSError or FileTooLarge)."""
    caption: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Skip:
    """A sample that is left out."""

    key: str
    reason: str
    detail: str = ""


class Part(Protocol):
    """A piece of the input that becomes one shard."""

    name: str
    """Of the shard, without `.tar`."""
    position: float
    """How far `samples` has come, from 0 to `weight`."""

    @property
    def source(self) -> str:
        """What it is a piece of; equal on every host."""
        ...

    @property
    def origin(self) -> str:
        """`source` with the folder that it lies in, which tells it from others of its name; equal on every host."""
        ...

    @property
    def size(self) -> int:
        """Bytes that it is read from, without the pictures of a folder."""
        ...

    @property
    def weight(self) -> float:
        """How much of the whole it is, in bytes: for the time left."""
        ...

    def samples(self) -> Iterator[RawSample | Skip]:
        """The samples in order.

        Raises:
            OSError: the file system failed; what is merely damaged is skipped.
            ValueError: no sample has the caption that was asked for.
        """
        ...


def find_parts(inputs: Sequence[str], caption_key: str | None, image_key: str, lines_a_part: int) -> list[Part]:
    """Split the input.

    Args:
        inputs: patterns as `find_shards` takes them; a folder with `metadata.jsonl` is read by that file.
        caption_key: JSON key or column of the captions; None: see `CAPTION_KEYS`, and in tars the `txt` first.
        image_key: column of a parquet file that holds the pictures.
        lines_a_part: pictures of a folder that become one shard.

    Raises:
        OSError, ValueError: as `find_shards`.
    """
    parts: list[Part] = []
    urls: list[str] = []
    patterns = []
    for name in inputs:
        folder = image_folder(name)
        if folder is None:
            patterns.append(name)
        else:
            parts += _folder_parts(folder, caption_key, lines_a_part)
            urls += [folder] * (len(parts) - len(urls))
    shards = find_shards(patterns) if patterns else []
    for shard in shards:
        if shard.is_parquet:
            parts.append(ParquetPart(shard.stem, shard, caption_key, image_key))
        else:
            parts.append(TarPart(shard.stem, shard, caption_key))
    urls += [shard.url for shard in shards]
    for part, name in zip(parts, distinct_names([part.name for part in parts], urls), strict=True):
        part.name = name
    return sorted(parts, key=lambda part: part.name)


def check_captions(part: Part) -> None:
    """Look at the first samples of a part; raises ValueError where the caption key that was asked for is nowhere."""
    for _ in islice(part.samples(), _PROBED):
        pass


class _WholeShard:
    """What a part that is one file takes from it."""

    shard: Shard

    @property
    def source(self) -> str:
        return self.shard.name

    @property
    def origin(self) -> str:
        return place(self.shard.url, 2)

    @property
    def size(self) -> int:
        return self.shard.size

    @property
    def weight(self) -> float:
        return self.shard.size


@dataclass
class TarPart(_WholeShard):
    """A webdataset tar: a picture, and `txt` or a key of `json`."""

    name: str
    shard: Shard
    caption_key: str | None
    position: float = 0.0

    def samples(self) -> Iterator[RawSample | Skip]:
        limits = dict.fromkeys(EXTENSIONS, MAX_BYTES) | {"txt": MAX_CAPTION_BYTES, "json": MAX_JSON_BYTES}
        keys = KeyWatch(self.caption_key, self.shard.url)
        used: set[str] = set()
        with open_shard(self.shard.url) as file:
            reader = TarReader(file, self.shard.size, limits).samples()
            while True:
                try:
                    with readable(self.shard.url, keep=(ValueError,)):
                        sample = next(reader, None)
                except TarDamage as damage:
                    yield Skip(self.shard.name, SHARD_DAMAGED, str(damage))
                    break
                if sample is None:
                    break
                key = safe_key(sample.key)
                self.position = sample.offset
                if sample.problem is not None or key in used:
                    yield Skip(sample.key, sample.problem or DUPLICATE)
                else:
                    used.add(key)
                    yield self._sample(key, sample.members, keys)
        keys.check()

    def _sample(self, key: str, members: Mapping[str, bytes], keys: KeyWatch) -> RawSample | Skip:
        image = next((members[name] for name in EXTENSIONS if name in members), None)
        if image is None:
            return Skip(key, NO_IMAGE)
        metadata: dict[str, Any] = {}
        if "json" in members:
            found = json_object(members["json"])
            if found is None:
                return Skip(key, BAD_JSON)
            metadata = found
            keys.saw(metadata)
        if self.caption_key is not None:
            value = metadata.get(self.caption_key)
        else:
            value = members["txt"] if "txt" in members else first_of(metadata, CAPTION_KEYS)
        caption, reason = read_caption(value)
        if reason:
            return Skip(key, reason)
        return RawSample(key, image, caption, plain_fields(metadata, self.caption_key))


@dataclass
class ParquetPart(_WholeShard):
    """A parquet file with a column of image bytes, or of the hub's {"bytes", "path"}, and one of captions."""

    name: str
    shard: Shard
    caption_key: str | None
    image_key: str
    position: float = 0.0

    def samples(self) -> Iterator[RawSample | Skip]:
        with open_shard(self.shard.url) as file:
            try:
                with opened_parquet(file) as parquet:
                    yield from self._rows(parquet)
            except ParquetDamage as damage:
                yield Skip(self.shard.name, SHARD_DAMAGED, str(damage))

    def _rows(self, parquet: Any) -> Iterator[RawSample | Skip]:
        caption, others = self._columns(parquet)
        row, rows = 0, max(parquet.metadata.num_rows, 1)
        for batch in row_batches(parquet, [self.image_key, caption, *others]):
            self.position = self.shard.size * row / rows
            for values in python_rows(batch):
                yield self._sample(row, values, caption)
                row += 1

    def _columns(self, parquet: Any) -> tuple[str, list[str]]:
        """The column of the captions, and those with plain values."""
        names = parquet.schema_arrow.names
        caption = self.caption_key or next((name for name in CAPTION_KEYS if name in names), CAPTION_KEYS[0])
        check_columns(parquet, [self.image_key, caption], self.shard.url)
        return caption, [name for name in plain_columns(parquet) if name not in (self.image_key, caption)]

    def _sample(self, row: int, values: dict[str, Any], caption_key: str) -> RawSample | Skip:
        key = f"{row:09d}"
        image = values.pop(self.image_key)
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes) or not image:
            return Skip(key, NO_IMAGE)
        if len(image) > MAX_BYTES:
            return Skip(key, TOO_LARGE)
        caption, reason = read_caption(values.pop(caption_key))
        return Skip(key, reason) if reason else RawSample(key, image, caption, plain_fields(values, None))


@dataclass
class FolderPart:
    """Consecutive lines of a folder's `metadata.jsonl`: {"file_name": ..., "caption" or "text": ...}."""

    name: str
    folder: str
    caption_key: str | None
    first: int
    offset: int
    lines: int
    size: int
    position: float = 0.0

    @property
    def weight(self) -> float:
        return self.lines * _BYTES_A_PICTURE

    @property
    def source(self) -> str:
        return f"{PurePosixPath(self.folder).name}/{METADATA}:{self.first}+{self.lines}"

    @property
    def origin(self) -> str:
        return f"{place(self.folder, 2)}/{METADATA}:{self.first}+{self.lines}"

    def samples(self) -> Iterator[RawSample | Skip]:
        url = f"{self.folder}/{METADATA}"
        keys = KeyWatch(self.caption_key, url)
        used: set[str] = set()
        with open_shard(url) as file, readable(url, keep=(ValueError,)):
            numbers = range(self.first, self.first + self.lines)
            for number, (_, line) in zip(numbers, lines_of(file, self.offset), strict=False):
                self.position = (number - self.first) * _BYTES_A_PICTURE
                sample = self._sample(number, line, keys)
                if isinstance(sample, RawSample):
                    if sample.key in used:
                        sample = Skip(sample.key, DUPLICATE)
                    used.add(sample.key)
                yield sample
        keys.check()

    def _sample(self, number: int, line: bytes, keys: KeyWatch) -> RawSample | Skip:
        key = f"line {number + 1}"
        values = json_object(line)
        if values is None:
            return Skip(key, BAD_JSON)
        keys.saw(values)
        name = values.pop("file_name", None)
        path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
        if not path.name or path.is_absolute() or ".." in path.parts or not is_file_name(str(path)):
            return Skip(key, NO_IMAGE, "no file_name inside the folder")
        key = safe_key(path.with_suffix("").as_posix())
        value = values.get(self.caption_key) if self.caption_key is not None else first_of(values, CAPTION_KEYS)
        caption, reason = read_caption(value)
        if reason:
            return Skip(key, reason)
        url = f"{self.folder}/{path}"
        return RawSample(key, lambda: _read_file(url), caption, plain_fields(values, self.caption_key))


def _folder_parts(folder: str, caption_key: str | None, lines_a_part: int) -> list[Part]:
    url = f"{folder}/{METADATA}"
    parts: list[tuple[int, int, int, int]] = []
    with open_shard(url) as file, readable(url, keep=(ValueError,)):
        first = offset = count = 0
        end = 0
        for end, _ in lines_of(file, 0):
            count += 1
            if count - first == lines_a_part:
                parts.append((first, offset, count - first, end - offset))
                first, offset = count, end
        if count > first:
            parts.append((first, offset, count - first, end - offset))
    if not parts:
        raise ValueError(f"{url} has no lines")
    name = PurePosixPath(folder.replace("\\", "/")).name or "folder"
    return [
        FolderPart(f"{name}-{index:05d}", folder, caption_key, first, offset, lines, size)
        for index, (first, offset, lines, size) in enumerate(parts)
    ]


def _read_file(url: str) -> bytes:
    """Raises FileNotFoundError where there is no picture of that name, whatever else there may be."""
    fs, path = file_system(url)
    with readable(url, keep=(FileTooLarge,)):
        try:
            info = fs.info(path)
            if info["type"] != "file":  # reading a pipe might take for ever
                raise FileNotFoundError(url)
            if info["size"] > MAX_BYTES:
                raise FileTooLarge(f"{url} has more than {MAX_BYTES:,} bytes")
            return bytes(fs.cat_file(path))
        except OSError as error:
            if error.errno in _NO_SUCH_NAME:
                raise FileNotFoundError(url) from error
            raise
