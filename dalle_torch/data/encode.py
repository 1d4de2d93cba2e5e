"""Captioned pictures to shards of VQGAN codes: the work behind `dalle-torch encode`.

A reader thread walks through the parts of the input, a pool of threads decodes pictures, the calling thread runs the
network and writes. Each part becomes one shard, committed by rename; a part that is interrupted is done again.

Owns: the order of work, resuming, the bound on bad samples, progress. Does not own: reading (`sources`), decoding
(`images`), the folder's format (`manifest`).
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch

from dalle_torch.data.decoding import Decoder, Outcome, decoded
from dalle_torch.data.encode_progress import EncodeProgress
from dalle_torch.data.images import MAX_PIXELS, PILLOW_MAX_PIXELS
from dalle_torch.data.manifest import MANIFEST, Manifest, Settings, ShardFolder, ShardRecord
from dalle_torch.data.shards import same_place
from dalle_torch.data.sources import SHARD_DAMAGED, Part, Skip, TarPart
from dalle_torch.data.text import TextEncoder
from dalle_torch.data.token_shard import PicturedSample, TokenShardWriter
from dalle_torch.data.vqgan_match import fingerprint
from dalle_torch.log import get_logger
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.storage import sha256_of

logger = get_logger(__name__)

BAD_SAMPLES_GRACE: Final = 1000
"""Samples that are seen before too many bad ones among them end a run early."""


MANIFEST_SECONDS: Final = 60.0
"""After so long the manifest is written again with the next shard."""

_SHOWN: Final = 5
"""Bad samples that an error names."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How the work is done; none of it shows in the shards, but for `caption_key`."""

    batch_size: int = 32
    """Pictures that go through the network together."""
    threads: int = 4
    """Threads that decode pictures."""
    max_pixels: int = MAX_PIXELS
    max_bad_fraction: float = 0.1
    host_index: int = 0
    host_count: int = 1
    caption_key: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("batch_size", "threads", "max_pixels", "host_count")
            if getattr(self, name) < 1
        ]
        if self.max_pixels > PILLOW_MAX_PIXELS:
            problems.append(f"max_pixels={self.max_pixels} must be at most {PILLOW_MAX_PIXELS}")
        if not 0 <= self.max_bad_fraction <= 1:
            problems.append(f"max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        if not 0 <= self.host_index < self.host_count:
            problems.append(f"host_index={self.host_index} must lie in [0, {self.host_count})")
        if problems:
            raise ValueError("encode cannot start: " + "; ".join(problems))


@dataclass
class EncodeReport:
    """What one host did."""

    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    network_seconds: float = 0.0
    """Of `seconds`, those spent in the network, its transfers included."""
    shards: int = 0
    kept: int = 0
    """Shards of this host that an earlier run had committed."""
    manifest: Manifest | None = None


def make_settings(vqgan: VQGAN, text: TextEncoder | None, caption_key: str | None) -> Settings:
    """What a folder records of the network and the tokenizer.

    Raises:
        ValueError: the codebook has more entries than shards can hold.
    """
    if vqgan.config.n_embed > 1 << 16:
        raise ValueError(f"the VQGAN has n_embed={vqgan.config.n_embed} codes; shards hold numbers below 65536")
    return Settings(
        vqgan=fingerprint(vqgan),
        resolution=vqgan.config.resolution,
        image_length=vqgan.config.image_length,
        codebook_size=vqgan.config.n_embed,
        dtype=str(vqgan.dtype).removeprefix("torch."),
        caption_key=caption_key,
        text=None if text is None else text.fingerprint,
    )


def encode(
    parts: Sequence[Part], folder: ShardFolder, vqgan: VQGAN, text: TextEncoder | None, options: EncodeOptions
) -> EncodeReport:
    """Encode this host's parts into `folder`; what is committed there already is kept.

    Args:
        parts: all parts of the input, in the same order on every host; host `i` of `n` takes those whose place is `i`
            modulo `n`.
        text: normalises and tokenises captions for the shards to hold; None leaves that to whoever reads them.

    Raises:
        OSError: the input cannot be read or the folder cannot be written.
        ValueError: the folder was made with other settings or from other input, or too many samples are bad. Shards
            that were committed stay.
    """
    settings = make_settings(vqgan, text, options.caption_key)
    _check_apart(parts, folder)
    folder.check_writable()
    # Names may change, and those are the caller's.
    parts = [copy(part) for part in parts]
    records = _begin(folder, settings, parts)
    mine = list(parts)[options.host_index :: options.host_count]
    report = EncodeReport()
    ratio = _BadRatio(options.max_bad_fraction)
    for part in mine:
        if record := records.get(f"{part.name}.tar"):
            report.kept += 1
            ratio.add(record)
    todo = [part for part in mine if f"{part.name}.tar" not in records]
    if report.kept:
        logger.info("%d of %d shards are there already", report.kept, len(mine))
    expected = [f"{part.name}.tar" for part in parts]
    running = _RunningManifest(folder, settings, expected)
    started = time.monotonic()
    try:
        _encode_parts(
            todo,
            folder,
            vqgan,
            Decoder(resolution=vqgan.config.resolution, max_pixels=options.max_pixels, text=text),
            options,
            report,
            ratio,
            running,
        )
    except BaseException:
        with suppress(Exception):
            folder.write_manifest(settings, expected)
        raise
    report.seconds = time.monotonic() - started
    report.manifest = folder.write_manifest(settings, expected)
    if report.manifest.complete and not report.manifest.samples:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in report.manifest.skipped.items())
        raise ValueError(
            f"{folder} is complete without a single sample (parts of the input: {len(parts)}, first {parts[0].origin}; "
            f"skipped: {reasons or 'nothing'}). Check what the input holds"
        )
    return report


class _RunningManifest:
    """Writes the manifest while the work goes on, so that little is missing from it when the process is killed."""

    def __init__(self, folder: ShardFolder, settings: Settings, expected: Sequence[str]) -> None:
        self.folder, self.settings, self.expected = folder, settings, expected
        self.due = time.monotonic() + MANIFEST_SECONDS

    def committed(self) -> None:
        """A shard was committed; the manifest is written where its time has come."""
        started = time.monotonic()
        if started < self.due:
            return
        self.folder.write_manifest(self.settings, self.expected)
        # Behind a URL, reading many records takes long: at most a twentieth of the time goes into it.
        ended = time.monotonic()
        self.due = ended + max(MANIFEST_SECONDS, 20 * (ended - started))


def _encode_parts(
    todo: Sequence[Part],
    folder: ShardFolder,
    vqgan: VQGAN,
    decoder: Decoder,
    options: EncodeOptions,
    report: EncodeReport,
    ratio: "_BadRatio",
    manifest: "_RunningManifest",
) -> None:
    # Enough to keep the network busy across the end of a part, and few enough to bound memory.
    ahead = 2 * options.batch_size + options.threads
    with EncodeProgress(todo) as shown, decoded(todo, decoder, options.threads, ahead) as outcomes:
        for part in todo:
            name = f"{part.name}.tar"
            folder.clean(name)
            with folder.writing(name) as path:
                record = _encode_part(
                    part, outcomes, path, vqgan, options.batch_size, report, shown, manifest.settings.digest
                )
                ratio.add(record)
                ratio.check(record, last=part is todo[-1])
            folder.write_record(record)
            manifest.committed()
            report.shards += 1
            shown.finish(part)


def _check_apart(parts: Sequence[Part], folder: ShardFolder) -> None:
    """Raises ValueError where a shard would take the place of the file that it is made from."""
    for part in parts:
        if isinstance(part, TarPart) and same_place(part.shard.url, f"{folder}/{part.name}.tar"):
            raise ValueError(f"{folder} holds the input, which the shards would replace. Name another folder for them")


def _begin(folder: ShardFolder, settings: Settings, parts: Sequence[Part]) -> dict[str, ShardRecord]:
    """The shards that are committed, after a check that they belong to the same work."""
    manifest = folder.manifest()
    records = folder.records()
    found = [] if manifest is None else settings.differences(manifest.settings)
    if found and records:
        raise ValueError(f"{folder} was made with other settings: here {'; '.join(found)} as there. Use another folder")
    if others := [name for name, record in records.items() if record.settings != settings.digest]:
        raise ValueError(
            f"{folder} was made with other settings: the record of {others[0]} (one of {len(others)}) names settings "
            f"{records[others[0]].settings or 'none'}, and here they are {settings.digest}. Use another folder"
        )
    records = _matched(folder, records, parts)
    if manifest is None or found:
        # Settings without shards bind nobody.
        folder.write_text(MANIFEST, Manifest(settings=settings, shards=[], complete=False).to_json())
    return records


def _matched(folder: ShardFolder, records: dict[str, ShardRecord], parts: Sequence[Part]) -> dict[str, ShardRecord]:
    """`records` without those of parts that are to be done again; parts are renamed to the shards made of them.

    Raises:
        ValueError: a shard of a part's name was made from something else.
    """
    names = {record.source: name for name, record in records.items()}
    origins = Counter(part.origin for part in parts)
    for part in parts:
        if f"{part.name}.tar" not in records or records[f"{part.name}.tar"].source != part.origin:
            # Which names a run gives depends on the other inputs; a shard keeps the one that it was made under.
            name = names.get(part.origin)
            if name is not None and origins[part.origin] == 1:
                part.name = name.removesuffix(".tar")
            elif name is not None and name not in {f"{other.name}.tar" for other in parts}:
                raise ValueError(
                    f"{folder}: {name} was made from {part.origin}, which {origins[part.origin]} of the inputs are "
                    "called. Use another folder for each"
                )
        record = records.get(f"{part.name}.tar")
        if record is None or (record.source, record.source_bytes) == (part.origin, part.size):
            continue
        if record.source == part.origin and (SHARD_DAMAGED in record.skipped or not record.samples):
            logger.info("%s has changed since it was found damaged, and is encoded again", part.origin)
            records = {name: other for name, other in records.items() if name != record.name}
            continue
        raise ValueError(
            f"{folder} was made from other input: {record.name} comes from {record.source} ({record.source_bytes:,} "
            f"bytes) and not from {part.origin} ({part.size:,} bytes). Use another folder, give all inputs in one "
            f"command, or remove {record.name} to have it made again"
        )
    return records


def _encode_part(
    part: Part,
    outcomes: Iterator[Outcome],
    path: Path,
    vqgan: VQGAN,
    batch_size: int,
    report: EncodeReport,
    shown: EncodeProgress,
    settings: str,
) -> ShardRecord:
    skipped: dict[str, list[str]] = {}
    samples = 0
    with TokenShardWriter(path) as shard:
        for batch in _batches(part, outcomes, batch_size, skipped):
            shard.write(batch, _codes(vqgan, batch, batch_size, report))
            samples += len(batch)
            report.samples += len(batch)
            shown.update(part, len(batch))
    report.skipped.update({reason: len(keys) for reason, keys in skipped.items()})
    return ShardRecord(
        name=f"{part.name}.tar",
        source=part.origin,
        samples=samples,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        skipped=skipped,
        offsets=shard.offsets,
        source_bytes=part.size,
        settings=settings,
    )


def _batches(
    part: Part, outcomes: Iterator[Outcome], batch_size: int, skipped: dict[str, list[str]]
) -> Iterator[list[PicturedSample]]:
    """The samples up to the end of the part; those that are left out go to `skipped`, by reason."""
    batch: list[PicturedSample] = []
    for item in outcomes:
        if isinstance(item, Skip):
            skipped.setdefault(item.reason, []).append(item.key)
            level = logging.WARNING if item.reason == SHARD_DAMAGED else logging.DEBUG
            logger.log(level, "%s: %s is left out: %s %s", part.source, item.key, item.reason, item.detail)
            continue
        if item is not None:
            batch.append(item)
        if len(batch) == batch_size or (item is None and batch):
            yield batch
            batch = []
        if item is None:
            return


def _codes(vqgan: VQGAN, batch: Sequence[PicturedSample], batch_size: int, report: EncodeReport) -> np.ndarray:
    """Codes [B, T] of the batch."""
    started = time.monotonic()
    pictures = [item.picture for item in batch]
    if vqgan.device.type != "cpu":
        # Compilers see one shape alone, and a picture's codes do not depend on how many others there are.
        pictures += [pictures[-1]] * (batch_size - len(pictures))
    pixels = vqgan.bytes_to_pixels(torch.from_numpy(np.stack(pictures)).to(vqgan.device))
    codes = vqgan.encode(pixels.contiguous(memory_format=torch.channels_last)).cpu().numpy()[: len(batch)]
    report.network_seconds += time.monotonic() - started
    return codes


class _BadRatio:
    """Ends a run in which too many samples are bad."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.good = 0
        self.bad: Counter[str] = Counter()

    def add(self, record: ShardRecord) -> None:
        self.good += record.samples
        self.bad.update({reason: len(keys) for reason, keys in record.skipped.items()})

    def check(self, record: ShardRecord, *, last: bool) -> None:
        """Raises ValueError where too many are bad, with some of those of `record`, which was added last."""
        bad = self.bad.total()
        seen = self.good + bad
        if bad > self.bound * (seen if last else max(seen, BAD_SAMPLES_GRACE)):
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.bad.most_common())
            named = [f"{_short(key)} ({reason})" for reason, keys in record.skipped.items() for key in keys]
            raise ValueError(
                f"{bad:,} of {seen:,} samples ({bad / seen:.1%}) cannot be used ({reasons}), more than "
                f"max_bad_fraction={self.bound:g} allows; in {record.source}: {', '.join(named[:_SHOWN])}"
                f"{', ...' if len(named) > _SHOWN else ''}. Shards before this one stay; DALLE_TORCH_LOG=debug prints "
                "each sample"
            )


def _short(key: str) -> str:
    """A key of an input that nobody checked, for a line."""
    text = ascii(key)[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."
