"""One shard on its way to scores: samples whose pictures can be judged, and the same written anew with a score each.

Owns: both formats, tars and parquet files, of pictures and of codes; which samples are left out and why. Does not own:
the scores, going through shards, resuming (`scoring`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
from PIL import Image

from dalle_torch.data.captions import BAD_JSON, CAPTION_KEYS, MAX_CAPTION_BYTES, MAX_JSON_BYTES, first_of, read_caption
from dalle_torch.data.captions import json_object as read_json
from dalle_torch.data.images import EXTENSIONS, MAX_BYTES, MAX_PIXELS, BadImage, decode_square
from dalle_torch.data.parquet import (
    ParquetDamage,
    RowWriter,
    check_columns,
    check_text,
    opened_parquet,
    python_values,
    row_batches,
)
from dalle_torch.data.shards import Shard, open_shard
from dalle_torch.data.sources import NO_IMAGE, SHARD_DAMAGED, Skip
from dalle_torch.data.tar import DUPLICATE, TOO_LARGE, TarDamage, TarReader, TarSample
from dalle_torch.data.token_reader import BAD_CODES, read_npy
from dalle_torch.data.token_shard import RawTarWriter

PICTURE_SIDE: Final = 256
"""Pixels; the centre square of a photograph is brought to this size, which is what DALL·E is trained on."""

_CODES, _FIELDS, _CAPTION = "npy", "json", "txt"
_CODES_COLUMN = "encoding"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is looked for in a sample, and what it gets.

    Attributes:
        score_key: JSON key or column of the score; one that is there is written over.
        caption_key: JSON key or column of the caption; None: of a tar the `txt`, else see `CAPTION_KEYS`.
        image_key: column of a parquet file that holds the pictures.
        codes: (how many, size of the codebook) where samples are codes; None: they are pictures.
    """

    score_key: str
    caption_key: str | None = None
    image_key: str = "image"
    codes: tuple[int, int] | None = None


@dataclass(slots=True)
class Scorable:
    """One sample: a caption, and a picture or codes; `stored` is what is written again."""

    key: str
    caption: str
    picture: Image.Image | None
    codes: np.ndarray | None
    stored: Any


class ScorableShard(Protocol):
    """A shard that is read and written at the same time."""

    @property
    def offsets(self) -> list[int]:
        """Of the tar that was written, as a `ShardRecord` has them; of a parquet file none."""
        ...

    def samples(self) -> Iterator[Scorable | Skip]:
        """All samples in order; damage ends them with a `Skip` of the shard's own name."""
        ...

    def write(self, scored: Sequence[tuple[Scorable, float]]) -> None:
        """Write samples that `samples` gave, in the same order."""
        ...


@contextmanager
def open_scorable(shard: Shard, path: Path, wanted: Wanted) -> Iterator[ScorableShard]:
    """Read `shard`, write `path`.

    Raises:
        OSError: the one cannot be read or the other not written.
        ParquetDamage: it is a parquet file of which nothing can be read.
        ValueError: a parquet file lacks a column, or what reads and writes shards is not installed.
    """
    with open_shard(shard.url) as file:
        if not shard.is_parquet:
            with RawTarWriter(path) as writer:
                yield _Tar(file, shard, writer, wanted)
            return
        # Not around the yield: what the judge or the writer raise is no damage of the file.
        opened = opened_parquet(file)
        with opened as parquet:
            names, schema = _columns(parquet, shard, wanted), parquet.schema_arrow
        with RowWriter(path, schema, wanted.score_key) as rows:
            yield _Parquet(file, shard, rows, wanted, names)


class _Tar:
    """A webdataset tar: the score goes into each sample's JSON, all other members stay as they are."""

    def __init__(self, file: BinaryIO, shard: Shard, writer: RawTarWriter, wanted: Wanted) -> None:
        self._reader = TarReader(file, shard.size, _Limits())
        self._name, self._writer, self._wanted = shard.name, writer, wanted

    @property
    def offsets(self) -> list[int]:
        return self._writer.offsets

    def samples(self) -> Iterator[Scorable | Skip]:
        used: set[str] = set()
        try:
            for sample in self._reader.samples():
                if sample.problem is not None or sample.key in used:
                    yield Skip(sample.key, sample.problem or DUPLICATE)
                    continue
                used.add(sample.key)
                yield self._sample(sample)
        except TarDamage as damage:
            yield Skip(self._name, SHARD_DAMAGED, str(damage))

    def write(self, scored: Sequence[tuple[Scorable, float]]) -> None:
        for sample, score in scored:
            members, fields = sample.stored
            data = dumps(fields | {self._wanted.score_key: score}, ensure_ascii=False).encode("utf-8", "replace")
            self._writer.write(sample.key, members | {_FIELDS: data})

    def _sample(self, sample: TarSample) -> Scorable | Skip:
        members = sample.members
        fields = read_json(members[_FIELDS]) if _FIELDS in members else {}
        if fields is None:
            return Skip(sample.key, BAD_JSON)
        if self._wanted.caption_key is not None:
            caption = fields.get(self._wanted.caption_key)
        else:
            caption = members[_CAPTION] if _CAPTION in members else first_of(fields, CAPTION_KEYS)
        if self._wanted.codes is not None:
            content: Any = read_npy(members[_CODES]) if _CODES in members else None
        else:
            content = next((members[name] for name in EXTENSIONS if name in members), None)
        return _scorable(sample.key, caption, content, self._wanted, (members, fields))


class _Parquet:
    """A parquet file: the score is a column more, all other columns stay as they are."""

    offsets: list[int]

    def __init__(self, file: BinaryIO, shard: Shard, rows: RowWriter, wanted: Wanted, columns: tuple[str, str]) -> None:
        self._file, self._name, self._rows, self._wanted = file, shard.name, rows, wanted
        self._caption, self._content = columns
        self.offsets = []

    def samples(self) -> Iterator[Scorable | Skip]:
        row = 0
        try:
            with opened_parquet(self._file) as parquet:
                for batch in row_batches(parquet, parquet.schema_arrow.names):
                    captions, contents = (python_values(batch.column(name)) for name in (self._caption, self._content))
                    for place, (caption, content) in enumerate(zip(captions, contents, strict=True)):
                        yield self._sample(f"{row:09d}", caption, content, (batch, place))
                        row += 1
        except ParquetDamage as damage:
            yield Skip(self._name, SHARD_DAMAGED, str(damage))

    def write(self, scored: Sequence[tuple[Scorable, float]]) -> None:
        self._rows.write([sample.stored for sample, _ in scored], [score for _, score in scored])

    def _sample(self, key: str, caption: Any, content: Any, stored: Any) -> Scorable | Skip:
        if self._wanted.codes is not None:
            whole = isinstance(content, list) and all(type(code) is int and abs(code) < 1 << 62 for code in content)
            content = np.array(content, dtype=np.int64) if whole else None
        else:
            content = content.get("bytes") if isinstance(content, dict) else content
        return _scorable(key, caption, content, self._wanted, stored)


class _Limits(dict[str, int]):
    """Every member is read, since every one is written again; pictures may be large, all else may not."""

    def get(self, extension: str, default: Any = None) -> int:
        return MAX_BYTES if extension in EXTENSIONS else max(MAX_JSON_BYTES, MAX_CAPTION_BYTES, 1 << 20)


def _columns(parquet: Any, shard: Shard, wanted: Wanted) -> tuple[str, str]:
    """The columns of the captions and of what is judged."""
    names = parquet.schema_arrow.names
    caption = wanted.caption_key or next((name for name in CAPTION_KEYS if name in names), CAPTION_KEYS[0])
    content = wanted.image_key if wanted.codes is None else _CODES_COLUMN
    check_columns(parquet, [caption, content], shard.url)
    check_text(parquet, caption, shard.url)
    if wanted.score_key in (caption, content):
        raise ValueError(f"{shard.url}: the score would be written over its column {wanted.score_key}; name another")
    return caption, content


def _scorable(key: str, caption: Any, content: Any, wanted: Wanted, stored: Any) -> Scorable | Skip:
    """The sample, or why it cannot be scored; `content` is a picture's file, or codes, or nothing of the kind."""
    text, reason = read_caption(caption)
    if reason:
        return Skip(key, reason)
    if wanted.codes is not None:
        length, size = wanted.codes
        if content is None or content.shape != (length,) or not 0 <= int(content.min()) <= int(content.max()) < size:
            return Skip(key, BAD_CODES)
        return Scorable(key, text, None, content, stored)
    if not isinstance(content, bytes) or not content:
        return Skip(key, NO_IMAGE)
    if len(content) > MAX_BYTES:
        return Skip(key, TOO_LARGE)
    try:
        picture, _ = decode_square(content, PICTURE_SIDE, MAX_PIXELS)
    except BadImage as error:
        return Skip(key, error.reason)
    return Scorable(key, text, Image.fromarray(picture), None, stored)
