"""What a data set looks like from outside: every sample's caption, score and fingerprints, in one pass.

Owns: reading shards of pictures, of codes and folders of pictures alike, hashes. Does not own: what is made of it
(`studies.explore`).
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from dalle_torch.data.captioned import holds_codes
from dalle_torch.data.captions import MAX_CAPTION_BYTES, MAX_JSON_BYTES, json_object, read_caption
from dalle_torch.data.images import MAX_PIXELS, BadImage, decode_square
from dalle_torch.data.shards import find_shards, open_shard
from dalle_torch.data.sources import FileTooLarge, RawSample, Skip, find_parts
from dalle_torch.data.tar import TarDamage, TarReader
from dalle_torch.data.token_reader import BAD_CODES, read_npy

THUMBNAIL: Final = 96
"""Pixels of a side of the pictures that are kept for sheets."""
_LINES_A_PART = 10_000


@dataclass(frozen=True, slots=True)
class Seen:
    """One sample.

    Attributes:
        shard: file or folder that it lies in.
        score: of its JSON; None where it has none.
        exact: equal for samples of equal pictures (the same bytes) or of equal codes.
        near: 64 bits that differ in few places for pictures that look alike; None for codes.
        thumbnail: uint8 [THUMBNAIL, THUMBNAIL, 3]; None for codes.
        codes: int64 [L]; None for pictures.
    """

    key: str
    shard: str
    caption: str
    score: float | None
    exact: bytes
    near: int | None = None
    thumbnail: np.ndarray | None = None
    codes: np.ndarray | None = None


def survey(
    inputs: Sequence[str], skipped: Counter[str], *, score_key: str, caption_key: str | None = None
) -> Iterator[Seen]:
    """All samples that can be read; of the others the reason is counted in `skipped`.

    Raises:
        OSError: an input is not there or cannot be read.
        ValueError: parquet files of codes, which hold no scores.
    """
    reader = _codes(inputs, score_key) if holds_codes(inputs) else _pictures(inputs, score_key, caption_key)
    for item in reader:
        if isinstance(item, str):
            skipped[item] += 1
        else:
            yield item


def difference_hash(picture: np.ndarray) -> int:
    """64 bits: whether each of 8 x 8 places is darker than its right neighbour.

    Args:
        picture: uint8 [H, W, 3].
    """
    small = np.asarray(Image.fromarray(picture).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits((small[:, :-1] < small[:, 1:]).ravel()).tobytes(), "big")


def _pictures(inputs: Sequence[str], score_key: str, caption_key: str | None) -> Iterator[Seen | str]:
    for part in find_parts(inputs, caption_key, "image", _LINES_A_PART):
        for sample in part.samples():
            yield sample.reason if isinstance(sample, Skip) else _picture(sample, part.source, score_key)


def _picture(sample: RawSample, shard: str, score_key: str) -> Seen | str:
    try:
        data = sample.image if isinstance(sample.image, bytes) else sample.image()
        thumbnail, _ = decode_square(data, THUMBNAIL, MAX_PIXELS)
    except FileTooLarge:
        return "member_too_large"
    except BadImage as error:
        return error.reason
    except ValueError:
        return "no_image"
    return Seen(
        sample.key, shard, sample.caption, _number(sample.metadata.get(score_key)), _digest(data),
        difference_hash(thumbnail), thumbnail,
    )  # fmt: skip


def _codes(inputs: Sequence[str], score_key: str) -> Iterator[Seen | str]:
    limits = {"npy": 1 << 20, "json": MAX_JSON_BYTES, "txt": MAX_CAPTION_BYTES}
    for shard in find_shards(list(inputs)):
        if shard.is_parquet:
            raise ValueError(f"{shard.url}: parquet files of codes are not explored; name tars of codes or pictures")
        with open_shard(shard.url) as file:
            try:
                for sample in TarReader(file, shard.size, limits).samples():
                    if sample.problem is not None:
                        yield sample.problem
                        continue
                    codes = read_npy(sample.members.get("npy", b""))
                    caption, reason = read_caption(sample.members.get("txt"))
                    if codes is None or codes.ndim != 1:
                        yield BAD_CODES
                    elif reason:
                        yield reason
                    else:
                        fields = json_object(sample.members.get("json", b"{}")) or {}
                        score = _number(fields.get(score_key))
                        numbers = codes.astype(np.int64)
                        yield Seen(sample.key, shard.url, caption, score, _digest(numbers.tobytes()), codes=numbers)
            except TarDamage:
                yield "shard_damaged"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=12).digest()


def _number(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and np.isfinite(value) else None
