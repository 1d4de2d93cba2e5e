"""Shards of tokens: which there are, and how many samples each has.

Owns: finding shards, their manifests, counting where there is none, and whether they fit the model. Does not own:
reading samples (`token_reader`), their order (`plan`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dalle_torch.data.manifest import MANIFEST, Manifest, ShardFolder, ShardRecord
from dalle_torch.data.parquet import ParquetDamage, check_columns, check_text, opened_parquet
from dalle_torch.data.shards import Shard, find_shards, open_shard, readable
from dalle_torch.data.tar import count_samples
from dalle_torch.data.token_shard import OFFSET_STRIDE
from dalle_torch.log import get_logger, progress

logger = get_logger(__name__)

_MIN_SAMPLE_BYTES: Final = 512
"""A header of a tar, without which there is no sample."""


@dataclass(frozen=True)
class TokenShard:
    """A shard with what is known of it before it is read."""

    url: str
    size: int
    samples: int
    """Samples that it should have: those of its record, whatever is left of the file. Where there is no record, one
    that is damaged has one more than can be read, which stands for what is lost."""
    is_parquet: bool
    text: str | None = None
    """Fingerprint of the tokenizer behind the token ids it holds."""
    offsets: tuple[int, ...] = ()
    """Bytes at which every `token_shard.OFFSET_STRIDE`th sample begins, where that is known."""


def find_token_shards(
    patterns: str | Sequence[str],
    *,
    image_length: int,
    codebook_size: int,
    columns: Sequence[str] = (),
    caption_column: str = "",
) -> list[TokenShard]:
    """The shards that patterns stand for, sorted by URL; those without samples are left out.

    Where a folder has a manifest it tells the number of samples, with the records of single shards where the manifest
    was not completed. Otherwise headers are counted: the whole of a tar is
    passed over, of parquet only the end.

    Args:
        patterns: as `shards.find_shards` takes them.
        image_length, codebook_size: of the model; manifests that say otherwise are refused.
        columns: that parquet files must have.
        caption_column: the one of them that must hold strings.

    Raises:
        OSError: no shard matches, or a file system cannot be read.
        ValueError: shards of another VQGAN, a record that cannot be true, a column that does not exist, or no
            samples at all.
    """
    shards = find_shards(patterns)
    manifests: dict[str, Manifest | None] = {}
    for shard in shards:
        if shard.folder not in manifests:
            manifest = ShardFolder(shard.folder).manifest()
            manifests[shard.folder] = manifest
            if manifest is not None:
                _check_fits(manifest, shard.folder, image_length, codebook_size)
    known = {
        (folder, record.name): (record, manifest.settings.text)
        for folder, manifest in manifests.items()
        if manifest is not None
        for record in _records(manifest, folder)
    }
    found = list(_counted(shards, known, columns, caption_column))
    if not any(shard.samples for shard in found):
        raise ValueError(f"{len(found)} shards, of which the first is {found[0].url}, have no sample")
    return [shard for shard in found if shard.samples]


def fingerprint(shards: Sequence[TokenShard]) -> str:
    """Equal for equal shards in equal order; where they lie makes no difference."""
    lines = [f"{shard.url.rpartition('/')[2]} {shard.samples}" for shard in shards]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _check_fits(manifest: Manifest, folder: str, image_length: int, codebook_size: int) -> None:
    settings = manifest.settings
    if not _is_count(settings.codebook_size):
        raise ValueError(f"{folder}: its manifest has codebook_size={settings.codebook_size!r}: a whole number is due")
    if settings.image_length != image_length or settings.codebook_size > codebook_size:
        raise ValueError(
            f"{folder} holds pictures of {settings.image_length} codes out of {settings.codebook_size}; the model "
            f"wants {image_length} out of {codebook_size}. Encode with the model's own VQGAN"
        )
    if not manifest.complete:
        logger.warning("%s is not complete: some of its input was not encoded yet", folder)


def _records(manifest: Manifest, folder: str) -> Iterator[ShardRecord]:
    """The records of a folder, each checked to be possible; newer ones than the manifest go before its own."""
    remedy = f"remove {folder}/{MANIFEST} to have the samples counted"
    single = [] if manifest.complete else ShardFolder(folder).all_records().values()
    for record in [*manifest.shards, *single]:
        if not isinstance(record.name, str):
            raise ValueError(f"{folder}: its manifest has {record.name!r} for the name of a shard; {remedy}")
        where = f"{folder}/{record.name}: its record has"
        for name, value in (("samples", record.samples), ("bytes", record.bytes)):
            if not _is_count(value):
                raise ValueError(f"{where} {name}={value!r}: a whole number of at least 0 is due; {remedy}")
        if record.samples > record.bytes // _MIN_SAMPLE_BYTES:
            raise ValueError(
                f"{where} samples={record.samples:,}; its {record.bytes:,} bytes hold "
                f"{record.bytes // _MIN_SAMPLE_BYTES:,} at most; {remedy}"
            )
        if not isinstance(record.offsets, list) or not all(map(_is_count, record.offsets)):
            raise ValueError(f"{where} offsets that are no list of whole numbers of at least 0; {remedy}")
        yield record


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _counted(
    shards: Sequence[Shard],
    known: dict[tuple[str, str], tuple[ShardRecord, str | None]],
    columns: Sequence[str],
    caption_column: str,
) -> Iterator[TokenShard]:
    unknown = sum((shard.folder, shard.name) not in known and not shard.is_parquet for shard in shards)
    if unknown:
        logger.info("counting the samples of %d shards that no manifest knows", unknown)
    for shard in progress(shards, desc="counting samples", unit="shard"):
        if shard.is_parquet:
            yield TokenShard(shard.url, shard.size, _count_rows(shard, columns, caption_column), True)
        elif (shard.folder, shard.name) in known:
            record, text = known[shard.folder, shard.name]
            samples, offsets = record.samples, tuple(record.offsets)
            if record.bytes != shard.size:
                logger.warning("%s has %d bytes, and %d by its manifest", shard.url, shard.size, record.bytes)
                # Places in another file.
                offsets = ()
                # What is cut off is lost and counts so, if the record is one that `encode` can have written: it has a
                # place for every so many samples.
                noted = OFFSET_STRIDE * len(record.offsets)
                if samples > max(noted, shard.size // _MIN_SAMPLE_BYTES):
                    samples = _count_tar(shard)
            yield TokenShard(shard.url, shard.size, samples, False, text, offsets)
        else:
            yield TokenShard(shard.url, shard.size, _count_tar(shard), False)


def _count_tar(shard: Shard) -> int:
    with open_shard(shard.url) as file, readable(shard.url):
        count, damage = count_samples(file, shard.size)
    if damage is not None:
        logger.warning("%s is damaged behind %d samples: %s", shard.url, count, damage)
    return count + (damage is not None)


def _count_rows(shard: Shard, columns: Sequence[str], caption_column: str) -> int:
    with open_shard(shard.url) as file:
        try:
            with opened_parquet(file) as parquet:
                check_columns(parquet, columns, shard.url)
                if caption_column:
                    check_text(parquet, caption_column, shard.url)
                return int(parquet.metadata.num_rows)
        except ParquetDamage as damage:
            logger.warning("%s is damaged: %s", shard.url, damage)
            return 1
