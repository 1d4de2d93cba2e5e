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
    check_text,
    opened_parquet,
    plain_columns,
    python_rows,
    row_batches,
)
from dalle_torch.data.part_names import distinct_names, place
from dalle_torch.data.picture_folder import METADATA, image_folder, is_file_name, lines_of
from dalle_torch.data.shards import Shard, file_system, find_shards, open_shard, readable
from dalle_torch.data.tar import BAD_NAME, DUPLICATE, MAX_KEY, TOO_LARGE, TarDamage, TarReader

NO_IMAGE: Final = "no_image"
SHARD_DAMAGED: Final = "shard_damaged"

_PROBED_SAMPLES, _PROBED_PARTS = 200, 16
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
    keys: KeyWatch
    """Of the whole input."""
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
            ValueError: the input has no caption of the key that was asked for.
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
    keys = KeyWatch(caption_key)
    for name in inputs:
        folder = image_folder(name)
        if folder is None:
            patterns.append(name)
        else:
            parts += _folder_parts(folder, keys, lines_a_part)
            urls += [folder] * (len(parts) - len(urls))
    shards = _find_shards(patterns) if patterns else []
    for shard in shards:
        if shard.is_parquet:
            parts.append(ParquetPart(shard.stem, shard, keys, image_key))
        else:
            parts.append(TarPart(shard.stem, shard, keys))
    urls += [shard.url for shard in shards]
    for part, name in zip(parts, distinct_names([part.name for part in parts], urls), strict=True):
        part.name = name
    return sorted(parts, key=lambda part: part.name)


def _find_shards(patterns: Sequence[str]) -> list[Shard]:
    try:
        return find_shards(patterns)
    except FileNotFoundError as error:
        for name in patterns:
            fs, path = file_system(name)
            if fs.isdir(path) and str(error) == f"no shard matches {name}":
                raise FileNotFoundError(
                    f"{name} has no tar, no parquet file and no {METADATA}. A folder of pictures needs {METADATA} in "
                    f'it, with a line for each picture: {{"file_name": "a.jpg", "text": "a red car"}}'
                ) from error
        raise


def check_captions(parts: Sequence[Part]) -> None:
    """Look at the first samples of the input.

    Raises:
        ValueError: the caption key that was asked for is in none of them, or the first parquet file lacks a column.
    """
    left, keys = _PROBED_SAMPLES, None
    for part in parts[:_PROBED_PARTS]:
        keys = part.keys
        for _ in islice(part.samples(), left):
            left -= 1
        if keys.content or not left:
            return
    if keys is not None and len(parts) <= _PROBED_PARTS:
        keys.check()


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
    keys: KeyWatch
    position: float = 0.0

    def samples(self) -> Iterator[RawSample | Skip]:
        limits = dict.fromkeys(EXTENSIONS, MAX_BYTES) | {"txt": MAX_CAPTION_BYTES, "json": MAX_JSON_BYTES}
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
                    yield self._sample(key, sample.members)

    def _sample(self, key: str, members: Mapping[str, bytes]) -> RawSample | Skip:
        image = next((members[name] for name in EXTENSIONS if name in members), None)
        if image is None:
            return Skip(key, NO_IMAGE)
        metadata: dict[str, Any] = {}
        if "json" in members:
            found = json_object(members["json"])
            if found is None:
                return Skip(key, BAD_JSON)
            metadata = found
        self.keys.saw(metadata if "json" in members else None, self.shard.url)
        if self.keys.key is not None:
            value = metadata.get(self.keys.key)
        else:
            value = members["txt"] if "txt" in members else first_of(metadata, CAPTION_KEYS)
        caption, reason = read_caption(value)
        if reason:
            return Skip(key, reason)
        return RawSample(key, image, caption, plain_fields(metadata, self.keys.key))


@dataclass
class ParquetPart(_WholeShard):
    """A parquet file with a column of image bytes, or of the hub's {"bytes", "path"}, and one of captions."""

    name: str
    shard: Shard
    keys: KeyWatch
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
        columns = [self.image_key, *others] if caption is None else [self.image_key, caption, *others]
        for batch in row_batches(parquet, columns):
            self.position = self.shard.size * row / rows
            for values in python_rows(batch):
                yield self._sample(row, values, caption)
                row += 1

    def _columns(self, parquet: Any) -> tuple[str | None, list[str]]:
        """The column of the captions, and those with plain values.

        None: there is none, as there was in parts before this one, so that its samples have no captions.

        Raises:
            ValueError: there is no such column, here or before, or it is one of numbers.
        """
        names = parquet.schema_arrow.names
        caption = self.keys.key or next((name for name in CAPTION_KEYS if name in names), CAPTION_KEYS[0])
        if caption not in names and self.keys.found:
            check_columns(parquet, [self.image_key], self.shard.url)
            return None, []
        check_columns(parquet, [self.image_key, caption], self.shard.url)
        check_text(parquet, caption, self.shard.url)
        self.keys.found = True
        return caption, [name for name in plain_columns(parquet) if name not in (self.image_key, caption)]

    def _sample(self, row: int, values: dict[str, Any], caption_key: str | None) -> RawSample | Skip:
        key = f"{row:09d}"
        image = values.pop(self.image_key)
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes) or not image:
            return Skip(key, NO_IMAGE)
        if len(image) > MAX_BYTES:
            return Skip(key, TOO_LARGE)
        caption, reason = read_caption(None if caption_key is None else values.pop(caption_key))
        return Skip(key, reason) if reason else RawSample(key, image, caption, plain_fields(values, None))


@dataclass
class FolderPart:
    """Consecutive lines of a folder's `metadata.jsonl`: {"file_name": ..., "caption" or "text": ...}."""

    name: str
    folder: str
    keys: KeyWatch
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
        used: set[str] = set()
        pictures: set[str] = set()
        with open_shard(url) as file, readable(url, keep=(ValueError,)):
            numbers = range(self.first, self.first + self.lines)
            for number, (_, line) in zip(numbers, lines_of(file, self.offset), strict=False):
                self.position = (number - self.first) * _BYTES_A_PICTURE
                path, sample = self._sample(number, line)
                if isinstance(sample, RawSample):
                    if sample.key in used and path not in pictures:
                        # Another picture than the one that has the key: "a.png" beside "a.jpg".
                        sample.key = safe_key(path.replace(".", "_"))
                    if len(sample.key) > MAX_KEY:
                        sample = Skip(sample.key[:MAX_KEY], BAD_NAME)
                    elif sample.key in used:
                        sample = Skip(sample.key, DUPLICATE)
                    used.add(sample.key)
                    pictures.add(path)
                yield sample

    def _sample(self, number: int, line: bytes) -> tuple[str, RawSample | Skip]:
        """(file below the folder, what becomes of it)."""
        key = f"line {number + 1}"
        values = json_object(line)
        if values is None:
            return "", Skip(key, BAD_JSON)
        self.keys.saw(values, f"{self.folder}/{METADATA}")
        name = values.pop("file_name", None)
        path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
        if not path.name or path.is_absolute() or ".." in path.parts or not is_file_name(str(path)):
            return "", Skip(key, NO_IMAGE, "no file_name inside the folder")
        key = safe_key(path.with_suffix("").as_posix())
        value = values.get(self.keys.key) if self.keys.key is not None else first_of(values, CAPTION_KEYS)
        caption, reason = read_caption(value)
        if reason:
            return str(path), Skip(key, reason)
        url = f"{self.folder}/{path}"
        fields = plain_fields(values, self.keys.key)
        return str(path), RawSample(key, lambda: _read_file(url), caption, fields)


def _folder_parts(folder: str, keys: KeyWatch, lines_a_part: int) -> list[Part]:
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
        FolderPart(f"{name}-{index:05d}", folder, keys, first, offset, lines, size)
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
