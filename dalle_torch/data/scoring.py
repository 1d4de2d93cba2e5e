"""A score for every sample of a data set: how well its picture shows its caption.

Shards are written anew with the score in each sample's JSON, under the key by which training filters
(`min_clip_score`, `max_clip_score`); all other members stay as they are. Shards of codes are decoded by their VQGAN.

Owns: going through shards, resuming, what is left out and why, the manifest of what is written. Does not own: the
score (`evaluation`), which threshold is best (`studies.explore`).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from dalle_torch.data.captions import BAD_JSON, CAPTION_KEYS, MAX_CAPTION_BYTES, MAX_JSON_BYTES, first_of, read_caption
from dalle_torch.data.captions import json_object as read_json
from dalle_torch.data.images import EXTENSIONS, MAX_BYTES, MAX_PIXELS, BadImage, decode_square
from dalle_torch.data.manifest import Manifest, ShardFolder, ShardRecord
from dalle_torch.data.shards import Shard, find_shards, open_shard, same_place
from dalle_torch.data.sources import NO_IMAGE, SHARD_DAMAGED
from dalle_torch.data.tar import DUPLICATE, TarDamage, TarReader, TarSample
from dalle_torch.data.token_reader import BAD_CODES, CLIP_SCORE, read_npy
from dalle_torch.data.token_shard import RawTarWriter
from dalle_torch.evaluation.base import CHUNK, TextImageScorer
from dalle_torch.log import get_logger, progress
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.storage import sha256_of

logger = get_logger(__name__)

SCORES: Final = "scores"
"""Folder of one file a shard, which says that it is scored, by whom, and what was left out."""
NO_SCORE: Final = "no_score"
PICTURE_SIDE: Final = 256
"""Pixels; the centre square of a photograph is brought to this size, which is what DALL·E is trained on."""

_CODES, _FIELDS, _CAPTION = "npy", "json", "txt"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How the work is shared out, and what is too bad to go on.

    Attributes:
        key: of the score in each sample's JSON.
        max_bad_fraction: share of samples that may be left out before the run ends with an error.
        host_index, host_count: host `i` of `n` takes every n-th shard.
    """

    key: str = CLIP_SCORE
    max_bad_fraction: float = 0.1
    host_index: int = 0
    host_count: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not self.key or not self.key.isidentifier():
            problems.append(f"key={self.key!r} must be a word such as clip_score")
        if not 0 <= self.max_bad_fraction <= 1:
            problems.append(f"max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        if not 0 <= self.host_index < self.host_count:
            problems.append(f"host_index={self.host_index} must lie in [0, {self.host_count})")
        if problems:
            raise ValueError("scoring cannot start: " + "; ".join(problems))


@dataclass
class ShardScores:
    """What was found in one shard.

    Attributes:
        name: of the file, the same in the input and in the output.
        source_bytes: of the input.
        judge: `Judge.to_json` of who scored.
        skipped: reason -> keys of the samples that were left out.
    """

    name: str
    source_bytes: int
    key: str
    judge: dict[str, Any]
    samples: int = 0
    total: float = 0.0
    lowest: float = float("inf")
    highest: float = float("-inf")
    skipped: dict[str, list[str]] = field(default_factory=dict)


def find_scorable(inputs: Sequence[str], folder: ShardFolder) -> list[Shard]:
    """The tars that patterns stand for.

    Raises:
        OSError: none matches.
        ValueError: a file is no tar, two have one name, or the output folder is the input's.
    """
    shards = find_shards(list(inputs))
    others = [shard.url for shard in shards if shard.is_parquet]
    if others:
        raise ValueError(
            f"{others[0]} is no tar: scores are written into tars; dalle-torch encode makes them of parquet"
        )
    twice = [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is in more than one folder: score each folder into one of its own")
    if any(same_place(shard.url, f"{folder}/{shard.name}") for shard in shards):
        raise ValueError(
            f"{folder} holds the input, which would be written over: name another folder for the scored shards"
        )
    return shards


def score_shards(
    shards: Sequence[Shard], folder: ShardFolder, scorer: TextImageScorer, vqgan: VQGAN | None, options: ScoringOptions
) -> list[ShardScores]:
    """Score this host's shards into `folder`; what is there already, by the same judge, is kept.

    Args:
        vqgan: decodes shards of codes; None: they hold pictures.

    Raises:
        OSError: a shard cannot be read, or the folder not written.
        ValueError: too many samples are bad; shards before stay.
    """
    folder.check_writable()
    judge = scorer.judge.to_json()
    found: list[ShardScores] = []
    mine = shards[options.host_index :: options.host_count]
    for shard in progress(mine, desc="scoring", unit="shard"):
        result = _kept(folder, shard, options.key, judge)
        if result is None:
            result = _score_shard(shard, folder, scorer, vqgan, options)
        found.append(result)
        _check_bad(found, options.max_bad_fraction)
    return found


def finish_manifest(inputs: Sequence[Shard], folder: ShardFolder) -> None:
    """Sum up the records of scored shards of codes, so that the folder is one that training and `encode` know."""
    manifest = _input_manifest(inputs)
    if manifest is not None:
        folder.write_manifest(manifest.settings, [shard.name for shard in inputs])


def _score_shard(
    shard: Shard, folder: ShardFolder, scorer: TextImageScorer, vqgan: VQGAN | None, options: ScoringOptions
) -> ShardScores:
    result = ShardScores(shard.name, shard.size, options.key, scorer.judge.to_json())
    folder.clean(shard.name)
    with folder.writing(shard.name) as path:
        with open_shard(shard.url) as file, RawTarWriter(path) as writer:
            waiting: list[_Sample] = []
            for sample in _samples(TarReader(file, shard.size, _Limits()), vqgan, result):
                waiting.append(sample)
                if len(waiting) == CHUNK:
                    _write(waiting, scorer, vqgan, writer, result)
                    waiting = []
            _write(waiting, scorer, vqgan, writer, result)
        size, sha256 = path.stat().st_size, sha256_of(path)
    record = _record_of(shard)
    if record is not None:
        values = asdict(record) | {
            "samples": result.samples, "bytes": size, "sha256": sha256, "offsets": writer.offsets,
            "skipped": _merged(record.skipped, result.skipped),
        }  # fmt: skip
        folder.write_record(ShardRecord(**values))
    # Last of all: it says that the shard is whole.
    folder.write_text(f"{SCORES}/{shard.name}.json", json.dumps(_finite(asdict(result))) + "\n")
    return result


@dataclass
class _Sample:
    key: str
    members: dict[str, bytes]
    fields: dict[str, Any]
    caption: str
    picture: Image.Image | None
    codes: np.ndarray | None


class _Limits(dict[str, int]):
    """Every member is read, since every one is written again; pictures may be large, all else may not."""

    def get(self, extension: str, default: Any = None) -> int:
        return MAX_BYTES if extension in EXTENSIONS else max(MAX_JSON_BYTES, MAX_CAPTION_BYTES, 1 << 20)


def _samples(reader: TarReader, vqgan: VQGAN | None, result: ShardScores) -> Iterator[_Sample]:
    used: set[str] = set()

    def skip(key: str, reason: str) -> None:
        result.skipped.setdefault(reason, []).append(key)

    try:
        for sample in reader.samples():
            if sample.problem is not None or sample.key in used:
                skip(sample.key, sample.problem or DUPLICATE)
                continue
            used.add(sample.key)
            found = _read(sample, vqgan)
            if isinstance(found, str):
                skip(sample.key, found)
            else:
                yield found
    except TarDamage as damage:
        logger.warning("%s cannot be read to its end: %s", result.name, damage)
        skip(result.name, SHARD_DAMAGED)


def _read(sample: TarSample, vqgan: VQGAN | None) -> _Sample | str:
    """A sample that can be scored, or why it cannot."""
    members = sample.members
    fields = read_json(members[_FIELDS]) if _FIELDS in members else {}
    if fields is None:
        return BAD_JSON
    caption, reason = read_caption(members[_CAPTION] if _CAPTION in members else first_of(fields, CAPTION_KEYS))
    if reason:
        return reason
    if vqgan is not None:
        codes = read_npy(members[_CODES]) if _CODES in members else None
        size, length = vqgan.config.n_embed, vqgan.config.image_length
        if codes is None or codes.shape != (length,) or not 0 <= int(codes.min()) <= int(codes.max()) < size:
            return BAD_CODES
        return _Sample(sample.key, members, fields, caption, None, codes)
    data = next((members[name] for name in EXTENSIONS if name in members), None)
    if data is None:
        return NO_IMAGE
    try:
        picture, _ = decode_square(data, PICTURE_SIDE, MAX_PIXELS)
    except BadImage as error:
        return error.reason
    return _Sample(sample.key, members, fields, caption, Image.fromarray(picture), None)


def _write(
    samples: list[_Sample], scorer: TextImageScorer, vqgan: VQGAN | None, writer: RawTarWriter, result: ShardScores
) -> None:
    if not samples:
        return
    scores = scorer.score(_pictures(samples, vqgan), [sample.caption for sample in samples])
    for sample, score in zip(samples, scores, strict=True):
        if not np.isfinite(score):
            result.skipped.setdefault(NO_SCORE, []).append(sample.key)
            continue
        fields = sample.fields | {result.key: score}
        data = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
        writer.write(sample.key, sample.members | {_FIELDS: data})
        result.samples += 1
        result.total += score
        result.lowest, result.highest = min(result.lowest, score), max(result.highest, score)


@torch.no_grad()
def _pictures(samples: list[_Sample], vqgan: VQGAN | None) -> list[Image.Image]:
    if vqgan is None:
        return [sample.picture for sample in samples if sample.picture is not None]
    codes = torch.from_numpy(
        np.stack([sample.codes for sample in samples if sample.codes is not None]).astype(np.int64)
    )
    filled = torch.cat([codes, codes[-1:].expand(CHUNK - len(codes), -1)])
    return vqgan.pixels_to_images(vqgan.decode(filled.to(vqgan.device)))[: len(samples)]


def _kept(folder: ShardFolder, shard: Shard, key: str, judge: dict[str, Any]) -> ShardScores | None:
    """What an earlier run found, if it is of this shard, by this judge, and what it wrote is there."""
    try:
        values = json.loads(folder.read_text(f"{SCORES}/{shard.name}.json") or "")
        kept = ShardScores(**values)
    except (ValueError, TypeError):
        return None
    if (kept.source_bytes, kept.key, kept.judge) != (shard.size, key, judge) or shard.name not in folder.sizes():
        logger.info("%s was scored otherwise, and is scored again", shard.name)
        return None
    return kept


def _check_bad(found: Sequence[ShardScores], bound: float) -> None:
    good = sum(result.samples for result in found)
    reasons: Counter[str] = Counter()
    for result in found:
        reasons.update({reason: len(keys) for reason, keys in result.skipped.items()})
    bad = reasons.total()
    if bad > bound * (good + bad):
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
        named = [f"{key} ({reason})" for reason, keys in found[-1].skipped.items() for key in keys][:_SHOWN]
        raise ValueError(
            f"{bad:,} of {good + bad:,} samples cannot be scored ({counts}), more than max_bad_fraction={bound:g} "
            f"allows; in {found[-1].name}: {', '.join(named) or 'none'}. Shards so far stay"
        )


def _input_manifest(shards: Sequence[Shard]) -> Manifest | None:
    return ShardFolder(shards[0].folder).manifest() if shards else None


def _record_of(shard: Shard) -> ShardRecord | None:
    return ShardFolder(shard.folder).all_records().get(shard.name)


def _merged(first: Mapping[str, list[str]], second: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {reason: [*first.get(reason, []), *second.get(reason, [])] for reason in {**first, **second}}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Without samples there is no lowest score."""
    return values | ({"lowest": 0.0, "highest": 0.0} if not values["samples"] else {})
