"""Samples of tokens out of shards, each checked; what cannot be used comes as an item with a reason.

Owns: members and columns, bounds on codes and token ids, filters, trying again where a file system fails for a moment.
Does not own: order (`plan`), shuffling (`lane`), text to ids (`text`).
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from dalle_torch.data.captions import (
    BAD_JSON,
    CAPTION_KEYS,
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    first_of,
    json_object,
    read_caption,
)
from dalle_torch.data.parquet import ParquetDamage, opened_parquet, python_values, row_batches
from dalle_torch.data.shards import open_shard, readable
from dalle_torch.data.tar import DUPLICATE, TarDamage, TarReader, TarSample
from dalle_torch.data.token_shard import CAPTION, CODES, FIELDS, OFFSET_STRIDE, TOKENS
from dalle_torch.data.tokens import TokenShard
from dalle_torch.log import get_logger

logger = get_logger(__name__)

NO_CODES: Final = "no_codes"
BAD_CODES: Final = "codes_malformed"
BAD_TOKENS: Final = "tokens_malformed"
SHARD_DAMAGED: Final = "shard_damaged"
CLIP_SCORE: Final = "clip_score"
FILTERED_BY_SCORE: Final = "clip_score"
FILTERED_BY_COLUMN: Final = "filter_column"

_BLOCK = 64
"""Samples whose codes are checked together."""
_RETRY_SECONDS = (1.0, 4.0, 16.0)
_UINT16 = np.dtype("<u2")
_MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(slots=True)
class TokenItem:
    """One sample, or what stands in the place of one that is left out."""

    key: str
    codes: bytes = b""
    """uint16 [T], little-endian."""
    caption: str = ""
    tokens: np.ndarray | None = None
    """Ids of the caption, its ends included and the padding not, where the shard has them."""
    bad: str = ""
    """Why it cannot be used."""
    filtered: str = ""
    """Which filter leaves it out."""
    value: Any = None
    """What the filter saw."""


@dataclass(frozen=True, kw_only=True)
class TokenReader:
    """Reads shards as one model wants them."""

    image_length: int
    codebook_size: int
    text: str
    """Fingerprint of the model's tokenizer: ids in shards that were made with it are used."""
    vocabulary: int
    max_length: int
    min_clip_score: float | None = None
    max_clip_score: float | None = None
    filter_column: str | None = None
    filter_value: Any = None
    caption_column: str = "caption"
    encoding_column: str = "encoding"

    @property
    def columns(self) -> list[str]:
        """Columns that a parquet file must have."""
        return [self.caption_column, self.encoding_column, *self._fields]

    @property
    def filter(self) -> str | None:
        """The filter of a column in words that are equal for equal ones."""
        return None if self.filter_column is None else f"{self.filter_column} == {self.filter_value!r}"

    @cached_property
    def _fields(self) -> list[str]:
        scored = self.min_clip_score is not None or self.max_clip_score is not None
        named = [CLIP_SCORE] if scored else []
        if self.filter_column is not None and self.filter_column not in named:
            named.append(self.filter_column)
        return named

    def read(self, shard: TokenShard, first: int, count: int) -> Iterator[TokenItem]:
        """Samples `first` to `first + count`, always so many: in place of what damage has swallowed come bad items.

        Raises:
            OSError: the file cannot be read, also after waiting and trying again.
        """
        done, failures = 0, 0
        read = self._read_parquet if shard.is_parquet else self._read_tar
        while True:
            try:
                for item in read(shard, first + done, count - done):
                    done += 1
                    yield item
                break
            except OSError as error:
                if failures == len(_RETRY_SECONDS) or isinstance(error, FileNotFoundError | PermissionError):
                    raise
                logger.warning("%s, trying again in %g s", error, _RETRY_SECONDS[failures])
                time.sleep(_RETRY_SECONDS[failures])
                failures += 1
        for place in range(first + done, first + count):
            yield TokenItem(f"sample {place}", bad=SHARD_DAMAGED)

    def _read_tar(self, shard: TokenShard, first: int, count: int) -> Iterator[TokenItem]:
        with_tokens = shard.text == self.text
        limits = {CODES: 64 * self.image_length + 1024, FIELDS: MAX_JSON_BYTES, CAPTION: MAX_CAPTION_BYTES}
        if with_tokens:
            limits[TOKENS] = 64 * self.max_length + 1024
        used: set[str] = set()
        known = min(first // OFFSET_STRIDE, len(shard.offsets) - 1)
        offset = shard.offsets[known] if known > 0 else 0
        with open_shard(shard.url) as file:
            block: list[TokenItem] = []
            samples = _whole_samples(TarReader(file, shard.size, limits), offset, shard.url)
            for number, sample in enumerate(samples, max(known, 0) * OFFSET_STRIDE):
                if number == first + count:
                    break
                if number >= first:
                    duplicate = sample.key in used
                    block.append(self._tar_item(sample, with_tokens) if not duplicate
                                 else TokenItem(sample.key, bad=DUPLICATE))  # fmt: skip
                used.add(sample.key)
                if len(block) == _BLOCK:
                    yield from self._checked(block)
                    block = []
            yield from self._checked(block)

    def _tar_item(self, sample: TarSample, with_tokens: bool) -> TokenItem:
        key, members = sample.key, sample.members
        if sample.problem is not None:
            return TokenItem(key, bad=sample.problem)
        data = members.get(CODES)
        if data is None:
            return TokenItem(key, bad=NO_CODES)
        codes = read_npy(data)
        if codes is None or codes.shape != (self.image_length,):
            return TokenItem(key, bad=BAD_CODES)
        ids = members.get(TOKENS) if with_tokens else None
        fields: Mapping[str, Any] = {}
        if self._fields or (ids is None and CAPTION not in members):
            found = json_object(members.get(FIELDS, b"{}"))
            if found is None:
                return TokenItem(key, bad=BAD_JSON)
            fields = found
            if filtered := self._filtered(fields):
                return TokenItem(key, filtered=filtered, value=self._seen(filtered, fields))
        if ids is not None:
            tokens = read_npy(ids)
            if tokens is None or tokens.ndim != 1 or not 0 < len(tokens) <= self.max_length:
                return TokenItem(key, bad=BAD_TOKENS)
            return TokenItem(key, _as_bytes(codes), tokens=tokens)
        value = members[CAPTION] if CAPTION in members else first_of(fields, CAPTION_KEYS)
        caption, reason = read_caption(value)
        return TokenItem(key, _as_bytes(codes), caption, bad=reason)

    def _read_parquet(self, shard: TokenShard, first: int, count: int) -> Iterator[TokenItem]:
        with open_shard(shard.url) as file:
            try:
                with opened_parquet(file) as parquet, readable(shard.url, keep=(ValueError, OSError)):
                    place = first
                    for batch in row_batches(parquet, self.columns, first, _BLOCK):
                        batch = batch.slice(0, first + count - place)
                        rows = enumerate(_rows(batch, self.encoding_column), place)
                        yield from self._checked([self._row_item(number, row) for number, row in rows])
                        place += len(batch)
                        if place == first + count:
                            return
            except ParquetDamage as damage:
                logger.warning("%s is damaged: %s", shard.url, damage)

    def _row_item(self, place: int, row: Mapping[str, Any]) -> TokenItem:
        key = f"row {place}"
        if filtered := self._filtered(row):
            return TokenItem(key, filtered=filtered, value=self._seen(filtered, row))
        codes = row[self.encoding_column]
        if codes is None:
            return TokenItem(key, bad=NO_CODES)
        if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.shape != (self.image_length,):
            return TokenItem(key, bad=BAD_CODES)
        caption, reason = read_caption(row[self.caption_column])
        return TokenItem(key, _as_bytes(codes), caption, bad=reason)

    def _filtered(self, fields: Mapping[str, Any]) -> str:
        low, high = self.min_clip_score, self.max_clip_score
        if low is not None or high is not None:
            score = fields.get(CLIP_SCORE)
            if not isinstance(score, int | float) or isinstance(score, bool):
                return FILTERED_BY_SCORE
            # Not a number compares as false.
            if not ((low is None or score >= low) and (high is None or score <= high)):
                return FILTERED_BY_SCORE
        if self.filter_column is not None and self._seen(FILTERED_BY_COLUMN, fields) != self.filter_value:
            return FILTERED_BY_COLUMN
        return ""

    def _seen(self, filtered: str, fields: Mapping[str, Any]) -> Any:
        """The value that a filter looks at."""
        value = fields.get(CLIP_SCORE if filtered == FILTERED_BY_SCORE else str(self.filter_column))
        # Arrays have no single answer to whether they are equal.
        return value.tolist() if isinstance(value, np.ndarray) else value

    def describe_filter(self, filtered: str) -> str:
        """What the filter wants."""
        if filtered == FILTERED_BY_COLUMN:
            return f"filter_column={self.filter_column} is to be {self.filter_value!r}"
        bounds = (("at least", self.min_clip_score), ("at most", self.max_clip_score))
        return f"{CLIP_SCORE} is to be " + " and ".join(
            f"{name} {value:g}" for name, value in bounds if value is not None
        )

    def _checked(self, block: Sequence[TokenItem]) -> Sequence[TokenItem]:
        """`block` with those marked whose numbers lie outside the model's vocabularies."""
        coded = [item for item in block if not (item.bad or item.filtered)]
        for item in coded:
            if not item.codes:
                item.bad = BAD_CODES
        coded = [item for item in coded if item.codes]
        if coded:
            codes = np.frombuffer(b"".join(item.codes for item in coded), dtype=_UINT16).reshape(len(coded), -1)
            for index in np.flatnonzero(codes.max(axis=1) >= self.codebook_size):
                coded[index].bad = BAD_CODES
        worded = [item for item in block if item.tokens is not None]
        if worded:
            rows = [item.tokens for item in worded if item.tokens is not None]
            starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
            together = np.concatenate(rows)
            wrong = (np.maximum.reduceat(together, starts) >= self.vocabulary) | (
                np.minimum.reduceat(together, starts) < 0
            )
            for index in np.flatnonzero(wrong):
                worded[index].bad = BAD_TOKENS
        return block


def read_npy(data: bytes) -> np.ndarray | None:
    """Integers out of the bytes of a .npy file, without copying and without unpickling; None where it holds none."""
    if data[:8] != _MAGIC:
        return None
    end = 10 + int.from_bytes(data[8:10], "little")
    layout = _layout(data[10:end])
    if layout is None or len(data) != end + layout[2]:
        return None
    dtype, shape, _ = layout
    return np.frombuffer(data, dtype=dtype, offset=end).reshape(shape)


_layouts: dict[bytes, tuple[np.dtype, tuple[int, ...], int] | None] = {}


def _layout(header: bytes) -> tuple[np.dtype, tuple[int, ...], int] | None:
    """(dtype, shape, bytes) that a header announces; None for anything but integers in one or no dimension."""
    if header not in _layouts:
        if len(_layouts) > 4096:
            _layouts.clear()
        _layouts[header] = _parse_layout(header)
    return _layouts[header]


def _parse_layout(header: bytes) -> tuple[np.dtype, tuple[int, ...], int] | None:
    # The header is a Python literal; one of plain integers is JSON but for its quotes, names and tuple.
    text = header.decode("latin-1").strip().replace("'", '"').replace("False", "false").replace("True", "true")
    text = text.replace(", }", "}").replace(",)", ")").replace("(", "[").replace(")", "]")
    try:
        values = json.loads(text)
        dtype, shape = np.dtype(values["descr"]), tuple(values["shape"])
    except (ValueError, TypeError, KeyError, RecursionError, SyntaxError):
        return None
    if dtype.kind not in "iu" or len(shape) > 1 or not all(type(side) is int and 0 <= side < 1 << 24 for side in shape):
        return None
    return dtype, shape, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _as_bytes(codes: np.ndarray) -> bytes:
    """Little-endian uint16; nothing where a number does not fit."""
    if codes.dtype != _UINT16:
        if codes.min(initial=0) < 0 or codes.max(initial=0) > 0xFFFF:
            return b""
        codes = codes.astype(_UINT16)
    return codes.tobytes()


def _whole_samples(reader: TarReader, offset: int, url: str) -> Iterator[TarSample]:
    """The samples up to where the archive is damaged; what a file system raises names the shard."""
    samples = reader.samples(offset)
    while True:
        try:
            with readable(url, keep=(ValueError,)):
                sample = next(samples, None)
        except TarDamage as damage:
            logger.warning("%s is damaged: %s", url, damage)
            return
        if sample is None:
            return
        yield sample


def _rows(batch: Any, encoding_column: str) -> Iterator[dict[str, Any]]:
    """Rows of a record batch, codes as arrays."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        is_list = hasattr(column, "values") and hasattr(column, "flatten")
        columns[name] = _lists(column) if is_list and name == encoding_column else python_values(column)
    for index in range(len(batch)):
        yield {name: values[index] for name, values in columns.items()}


def _lists(column: Any) -> list[np.ndarray | None]:
    """Each row of a column of lists as an array, or None where it is null or has nulls in it."""
    found: list[np.ndarray | None] = []
    for scalar in column:
        values = scalar.values
        found.append(None if values is None or values.null_count else values.to_numpy(zero_copy_only=False))
    return found
