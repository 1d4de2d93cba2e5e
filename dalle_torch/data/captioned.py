"""Captioned pictures to measure a model by, from whatever they are stored in: pictures, codes, or drawn on the spot.

Owns: telling shards of codes from shards of pictures, one stream of samples out of both. Does not own: the readers
(`sources`, `token_reader`), what is measured (`studies`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dalle_torch.data.decoding import Decoder
from dalle_torch.data.images import MAX_PIXELS
from dalle_torch.data.manifest import ShardFolder
from dalle_torch.data.picture_folder import image_folder
from dalle_torch.data.shards import Shard, find_shards, open_shard
from dalle_torch.data.sources import Skip, check_captions, find_parts
from dalle_torch.data.tar import TarDamage, TarReader
from dalle_torch.data.token_reader import TokenReader
from dalle_torch.data.tokens import find_token_shards, fingerprint
from dalle_torch.log import get_logger
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.sampling import sample_scenes

logger = get_logger(__name__)

SHAPES = "shapes"
"""The name of the captioned shapes, which need no files."""
_CODES = "npy"
_COLUMN = "encoding"
_PROBED = 64
_LINES_A_PART = 10_000


@dataclass(frozen=True, slots=True)
class Captioned:
    """One sample: a caption, and a picture or the codes of one.

    Attributes:
        picture: uint8 [side, side, 3]; None where only codes are known.
        codes: int64 [L]; None where there is a picture.
    """

    key: str
    caption: str
    picture: np.ndarray | None = None
    codes: np.ndarray | None = None


@dataclass
class CaptionedData:
    """A stream of samples, always in the same order.

    Attributes:
        names: patterns as `shards.find_shards` takes them, a folder with `metadata.jsonl`, or "shapes".
        resolution: side that pictures are cut and scaled to.
        image_length, codebook_size: of the VQGAN; codes of another are refused.
        seed: of the shapes.
        skipped: how many samples were left out, by reason, of those read so far.
    """

    names: Sequence[str]
    resolution: int
    image_length: int
    codebook_size: int
    caption_key: str | None = None
    seed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("no data is named: give shards, a folder of pictures, or shapes")
        self.kind = "shapes" if list(self.names) == [SHAPES] else "codes" if holds_codes(self.names) else "pictures"
        """ "pictures", "codes" or "shapes"."""

    def describe(self) -> dict[str, object]:
        """What the samples are, for a result."""
        about: dict[str, object] = {"names": list(self.names), "kind": self.kind}
        if self.kind == "shapes":
            return about | {"seed": self.seed}
        return about | {"skipped": dict(sorted(self.skipped.items()))}

    def read(self, limit: int | None = None) -> list[str]:
        """The captions of the first `limit` samples that are whole; pictures come from `samples` again."""
        return [sample.caption for sample in self.samples(limit)]

    def samples(self, limit: int | None = None) -> Iterator[Captioned]:
        """The first `limit` samples that are whole; None: all, which shapes have no end of.

        Raises:
            OSError: data cannot be read.
            ValueError: there is not one whole sample.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} must be at least 1")
        self.skipped.clear()
        count = 0
        for sample in self._all():
            if isinstance(sample, str):
                self.skipped[sample] += 1
                continue
            yield sample
            count += 1
            if count == limit:
                return
        if not count:
            why = ", ".join(f"{reason} {number:,}" for reason, number in self.skipped.items()) or "it is empty"
            raise ValueError(f"{' '.join(self.names)} has not one usable sample: {why}")

    def _all(self) -> Iterator[Captioned | str]:
        """Samples, and in the place of those left out the reason."""
        return {"shapes": self._shapes, "codes": self._codes, "pictures": self._pictures}[self.kind]()

    def _shapes(self) -> Iterator[Captioned]:
        if self.resolution != 64:
            raise ValueError(
                f"shapes are pictures of 64 x 64, and the model draws {self.resolution} x {self.resolution}"
            )
        start = 0
        while True:
            scenes = sample_scenes(_PROBED, self.seed, start=start)
            for number, (scene, picture) in enumerate(zip(scenes, render(scenes, self.seed, start=start), strict=True)):
                yield Captioned(f"{start + number:08d}", scene.caption, picture=picture)
            start += _PROBED

    def _codes(self) -> Iterator[Captioned | str]:
        shards = find_token_shards(
            list(self.names), image_length=self.image_length, codebook_size=self.codebook_size,
            columns=[self.caption_key or "caption", _COLUMN], caption_column=self.caption_key or "caption",
        )  # fmt: skip
        logger.debug("data %s", fingerprint(shards))
        reader = TokenReader(
            image_length=self.image_length, codebook_size=self.codebook_size, text="", vocabulary=1, max_length=1,
            caption_column=self.caption_key or "caption", encoding_column=_COLUMN,
        )  # fmt: skip
        for shard in shards:
            for item in reader.read(shard, 0, shard.samples):
                codes = np.frombuffer(item.codes, dtype="<u2").astype(np.int64)
                yield item.bad or Captioned(item.key, item.caption, codes=codes)

    def _pictures(self) -> Iterator[Captioned | str]:
        parts = find_parts(self.names, self.caption_key, "image", _LINES_A_PART)
        check_captions(parts)
        decoder = Decoder(resolution=self.resolution, max_pixels=MAX_PIXELS, text=None)
        for part in parts:
            for sample in part.samples():
                decoded = sample if isinstance(sample, Skip) else decoder(sample, part.source)
                if isinstance(decoded, Skip):
                    yield decoded.reason
                else:
                    assert not isinstance(sample, Skip)
                    yield Captioned(decoded.key, sample.caption, picture=decoded.picture)


def holds_codes(names: Sequence[str]) -> bool:
    """Whether names stand for shards of codes; otherwise they are pictures, or nothing at all."""
    if any(image_folder(name) for name in names):
        return False
    try:
        shard = find_shards(list(names))[0]
    except FileNotFoundError:
        # What is wrong with the names is told by whoever reads them.
        return False
    if ShardFolder(shard.folder).manifest() is not None:
        return True
    return _parquet_has_codes(shard) if shard.is_parquet else _tar_has_codes(shard)


def _parquet_has_codes(shard: Shard) -> bool:
    from dalle_torch.data.parquet import ParquetDamage, opened_parquet

    try:
        with open_shard(shard.url) as file, opened_parquet(file) as parquet:
            return _COLUMN in parquet.schema_arrow.names
    except ParquetDamage as damage:
        raise ParquetDamage(f"{shard.url} is damaged: {damage}") from damage


def _tar_has_codes(shard: Shard) -> bool:
    with open_shard(shard.url) as file:
        samples = TarReader(file, shard.size, {_CODES: 1 << 20}).samples()
        try:
            return any(_CODES in sample.members for sample, _ in zip(samples, range(_PROBED), strict=False))
        except TarDamage:
            return False
