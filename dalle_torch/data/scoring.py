"""A score for every sample of a data set: how well its picture shows its caption.

Shards are written anew with the score in each sample's JSON, or as a column of a parquet file, under the key by which
training filters (`min_clip_score`, `max_clip_score`); all else stays as it is. Codes are decoded by their VQGAN.

Owns: going through shards, resuming, the manifest of what is written. Does not own: reading and writing one of them
(`scorable`), the score (`evaluation`), which threshold is best (`studies.explore`).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from dalle_torch.data.manifest import Manifest, ShardFolder, ShardRecord
from dalle_torch.data.parquet import ParquetDamage
from dalle_torch.data.scorable import Scorable, ScorableShard, Wanted, open_scorable
from dalle_torch.data.shards import Shard, find_shards, same_place
from dalle_torch.data.sources import SHARD_DAMAGED, Skip
from dalle_torch.data.token_reader import CLIP_SCORE
from dalle_torch.evaluation.base import CHUNK, TextImageScorer
from dalle_torch.log import get_logger, progress
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.storage import sha256_of

logger = get_logger(__name__)

SCORES: Final = "scores"
"""Folder of one file a shard, which says that it is scored, by whom, and what was left out."""
NO_SCORE: Final = "no_score"

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How the work is shared out, and what is too bad to go on.

    Attributes:
        key: JSON key or column of the score.
        caption_key: JSON key or column of the captions; None: the `txt` of tars, else `captions.CAPTION_KEYS`.
        image_key: column of parquet files that holds the pictures.
        max_bad_fraction: share of samples that may be left out before the run ends with an error.
        host_index, host_count: host `i` of `n` takes every n-th shard.
    """

    key: str = CLIP_SCORE
    caption_key: str | None = None
    image_key: str = "image"
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
    """The tars and parquet files that patterns stand for.

    Raises:
        OSError: none matches.
        ValueError: two have one name, or the output folder is the input's.
    """
    shards = find_shards(list(inputs))
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
        ValueError: too many samples are bad, or a parquet file lacks a column; shards before stay.
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
    codes = None if vqgan is None else (vqgan.config.image_length, vqgan.config.n_embed)
    wanted = Wanted(
        score_key=options.key, caption_key=options.caption_key, image_key=options.image_key, codes=codes
    )  # fmt: skip
    folder.clean(shard.name)
    try:
        with folder.writing(shard.name) as path:
            with open_scorable(shard, path, wanted) as opened:
                _copy(opened, scorer, vqgan, result)
            size, sha256, offsets = path.stat().st_size, sha256_of(path), opened.offsets
    except ParquetDamage as damage:
        # Without its footer a parquet file has not even columns: there is nothing to write.
        logger.warning("%s cannot be read: %s", shard.url, damage)
        result.skipped[SHARD_DAMAGED] = [shard.name]
        return result
    record = None if shard.is_parquet else _record_of(shard)
    if record is not None:
        values = asdict(record) | {
            "samples": result.samples, "bytes": size, "sha256": sha256, "offsets": offsets,
            "skipped": _merged(record.skipped, result.skipped),
        }  # fmt: skip
        folder.write_record(ShardRecord(**values))
    # Last of all: it says that the shard is whole.
    folder.write_text(f"{SCORES}/{shard.name}.json", json.dumps(_finite(asdict(result))) + "\n")
    return result


def _copy(shard: ScorableShard, scorer: TextImageScorer, vqgan: VQGAN | None, result: ShardScores) -> None:
    """Score all samples of a shard, and write those that have a score."""
    waiting: list[Scorable] = []
    for sample in shard.samples():
        if isinstance(sample, Skip):
            if sample.reason == SHARD_DAMAGED:
                logger.warning("%s cannot be read to its end: %s", result.name, sample.detail)
            result.skipped.setdefault(sample.reason, []).append(sample.key)
            continue
        waiting.append(sample)
        if len(waiting) == CHUNK:
            shard.write(_scored(waiting, scorer, vqgan, result))
            waiting = []
    shard.write(_scored(waiting, scorer, vqgan, result))


def _scored(
    samples: list[Scorable], scorer: TextImageScorer, vqgan: VQGAN | None, result: ShardScores
) -> list[tuple[Scorable, float]]:
    """Samples with their scores, and into `result` what is to be said of them."""
    if not samples:
        return []
    found: list[tuple[Scorable, float]] = []
    scores = scorer.score(_pictures(samples, vqgan), [sample.caption for sample in samples])
    for sample, score in zip(samples, scores, strict=True):
        if not np.isfinite(score):
            result.skipped.setdefault(NO_SCORE, []).append(sample.key)
            continue
        found.append((sample, score))
        result.samples += 1
        result.total += score
        result.lowest, result.highest = min(result.lowest, score), max(result.highest, score)
    return found


@torch.no_grad()
def _pictures(samples: list[Scorable], vqgan: VQGAN | None) -> list[Image.Image]:
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
