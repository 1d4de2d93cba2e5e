"""What a data set holds: scores and what a threshold would keep, captions, words, duplicates; a page and a table.

Owns: the pass over the data, the statistics. Does not own: reading (`data.survey`), scoring (`data.scoring`), what
looks alike (`duplicates`), the page (`explore_page`).

Memory grows by a few hundred bytes a sample (names and fingerprints, of which duplicates are found), whatever the
pictures.
"""

import csv
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from dalle_torch.data.survey import Seen, survey
from dalle_torch.evaluation.protocol import environment, write_result
from dalle_torch.hashing import hashed
from dalle_torch.log import progress
from dalle_torch.reports import charts
from dalle_torch.storage import atomic_file
from dalle_torch.studies.duplicates import MAX_PAIRS, NEAR_BITS, CodeRows, near_fingerprints
from dalle_torch.studies.explore_page import Decode, Shown, explore_page

MAX_WORDS: Final = 1_000_000
"""Different words that are counted; beyond it the rare ones are forgotten, and counts are lower bounds."""

_THRESHOLDS = 20
_SHOWN_A_BIN, _SHOWN_BINS = 6, 12
_SHOWN_WORDS, _SHOWN_PAIRS = 60, 24
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


@dataclass
class Numbers:
    """Values as they come, kept as 4 bytes each."""

    chunks: list[np.ndarray] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.waiting.append(value)
        if len(self.waiting) == 4096:
            self.chunks.append(np.array(self.waiting, dtype=np.float32))
            self.waiting = []

    def array(self) -> np.ndarray:
        return np.concatenate([*self.chunks, np.array(self.waiting, dtype=np.float32)])


@dataclass
class Findings:
    """All that one pass over a data set tells."""

    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    scores: Numbers = field(default_factory=Numbers)
    characters: Numbers = field(default_factory=Numbers)
    words: Numbers = field(default_factory=Numbers)
    tokens: Numbers = field(default_factory=Numbers)
    frequencies: Counter[str] = field(default_factory=Counter)
    captions: Counter[bytes] = field(default_factory=Counter)
    exact: dict[bytes, list[str]] = field(default_factory=lambda: defaultdict(list))
    near: list[tuple[int, str]] = field(default_factory=list)
    codes: CodeRows | None = None
    """Different ones, of data that are codes."""
    code_names: list[str] = field(default_factory=list)
    """Of the rows of `codes`."""
    shown: list[Shown] = field(default_factory=list)


def explore(
    inputs: Sequence[str],
    folder: Path,
    *,
    score_key: str = "clip_score",
    caption_key: str | None = None,
    decode: Decode | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> dict[str, Any]:
    """Go through a data set once; writes `explore.html`, `explore.json` and `samples.csv` into `folder`.

    Args:
        inputs: tars, parquet files of pictures, or a folder with metadata.jsonl.
        score_key: of the score in each sample's JSON.
        decode: makes pictures of the codes that are shown; None shows none.
        count_tokens: a caption's token ids; None leaves them out.

    Returns:
        What `explore.json` holds.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the input cannot be read or the folder not written.
        ValueError: there is no sample.
    """
    charts.scatter({}, x="", y="")  # Without it a long pass would end in an error.
    found = Findings()
    folder.mkdir(parents=True, exist_ok=True)
    sample_of = _Reservoirs()
    with (
        closing(CodeRows(folder)) as found.codes,
        atomic_file(folder / "samples.csv") as path,
        path.open("w", newline="", encoding="utf-8", errors="replace") as out,
    ):
        writer = csv.writer(out)
        writer.writerow(["shard", "key", "score", "characters", "words", "fingerprint", "near_fingerprint", "caption"])
        for seen in progress(survey(inputs, found.skipped, score_key=score_key, caption_key=caption_key),
                             desc="exploring", unit="sample"):  # fmt: skip
            words = _take(found, seen, count_tokens)
            sample_of.offer(seen)
            near = "" if seen.near is None else f"{seen.near:016x}"
            writer.writerow(
                [seen.shard, seen.key, "" if seen.score is None else repr(seen.score), len(seen.caption), words,
                 seen.exact.hex(), near, seen.caption]
            )  # fmt: skip
        if not found.samples:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.skipped.items())
            raise ValueError(f"{' '.join(inputs)} has not one sample that can be read: {reasons or 'it is empty'}")
        found.shown = sample_of.samples()
        result = _summary(found, inputs)
    write_result(folder / "explore.json", result)
    arrays = {"score": found.scores.array(), "words": found.words.array()}
    explore_page(result, arrays, found.shown, decode).save(folder / "explore.html")
    return result


class _Reservoirs:
    """Samples along the whole scale of scores, a few of each stretch, without knowing the scale beforehand.

    The 20 samples of the least random numbers are kept for each of 64 stretches of the scale seen so far; a sample
    depends on nothing but the order of the data.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[int, int, Shown]]] = defaultdict(list)
        self._count = 0

    def offer(self, seen: Seen) -> None:
        rank = int(hashed((0x5EE,), self._count, self._count + 1)[0])
        self._count += 1
        score = seen.score if seen.score is not None else 0.0
        heap = self._kept[int(np.floor(score * 100))]
        item = (-rank, self._count, Shown(seen.key, seen.caption, score, seen.thumbnail, seen.codes))
        if len(heap) < _SHOWN_A_BIN:
            heapq.heappush(heap, item)
        elif item[0] > heap[0][0]:
            heapq.heapreplace(heap, item)

    def samples(self) -> list[Shown]:
        """From the lowest score to the highest: at most `_SHOWN_BINS` stretches of the scale, evenly chosen."""
        stretches = sorted(self._kept)
        if len(stretches) > _SHOWN_BINS:
            places = np.linspace(0, len(stretches) - 1, _SHOWN_BINS).round().astype(int)
            stretches = [stretches[place] for place in places]
        return [shown for stretch in stretches for _, _, shown in sorted(self._kept[stretch], reverse=True,
                                                                        key=lambda item: item[:2])]  # fmt: skip


def _take(found: Findings, seen: Seen, count_tokens: Callable[[str], int] | None) -> int:
    """Add one sample; returns the number of its caption's words."""
    words = _WORD.findall(seen.caption.lower())
    found.samples += 1
    found.characters.add(len(seen.caption))
    found.words.add(len(words))
    if count_tokens is not None:
        found.tokens.add(count_tokens(seen.caption))
    found.frequencies.update(words)
    if len(found.frequencies) > MAX_WORDS:
        found.frequencies = Counter(dict(found.frequencies.most_common(MAX_WORDS // 2)))
    if seen.score is not None:
        found.scores.add(seen.score)
    found.captions[_digest(" ".join(words))] += 1
    name = f"{seen.shard.rpartition('/')[2]}:{seen.key}"
    rows, first = found.codes, seen.exact not in found.exact
    if first and rows is not None and seen.codes is not None and rows.add(seen.codes):
        found.code_names.append(name)
    if len(places := found.exact[seen.exact]) < 10:
        places.append(name)
    if seen.near is not None:
        found.near.append((seen.near, name))
    return len(words)


def _digest(text: str) -> bytes:
    import hashlib

    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()


def _summary(found: Findings, inputs: Sequence[str]) -> dict[str, Any]:
    scores = found.scores.array()
    copies = [names for names in found.exact.values() if len(names) > 1]
    return {
        "data": list(inputs),
        "samples": found.samples,
        "skipped": dict(sorted(found.skipped.items())),
        "scores": None if not len(scores) else _spread(scores) | {"without": found.samples - len(scores)},
        "thresholds": _thresholds(scores, found.samples),
        "caption_characters": _spread(found.characters.array()),
        "caption_words": _spread(found.words.array()),
        "caption_tokens": _spread(tokens) if len(tokens := found.tokens.array()) else None,
        "equal_captions": sum(count - 1 for count in found.captions.values()),
        "equal_pictures": {
            "groups": len(copies),
            "samples": sum(len(names) - 1 for names in copies),
            "first": copies[:_SHOWN_PAIRS],
        },
        "near_pictures": _about_near(found.near),
        "near_codes": None if found.codes is None else _about_near_codes(found.codes, found.code_names),
        "words": found.frequencies.most_common(_SHOWN_WORDS),
        "different_words": len(found.frequencies),
        "run": {"environment": environment()},
    }


def _about_near(fingerprints: Sequence[tuple[int, str]]) -> dict[str, Any] | None:
    if not fingerprints:
        return None
    near = list(near_fingerprints(fingerprints))
    return {"pairs": len(near), "most_bits": NEAR_BITS, "of_bits": 64, "first": near[:_SHOWN_PAIRS]}


def _about_near_codes(rows: CodeRows, names: Sequence[str]) -> dict[str, Any] | None:
    if not rows.count:
        return None
    near = rows.near()
    first = [(names[pair.one], names[pair.other], pair.codes) for pair in near[:_SHOWN_PAIRS]]
    return {"pairs": len(near), "all": len(near) < MAX_PAIRS, "most_codes": rows.most, "of_codes": rows.length,
            "different": rows.count, "first": first}  # fmt: skip


def _spread(values: np.ndarray) -> dict[str, float]:
    """Float64 figures of float32 values."""
    numbers = values.astype(np.float64)
    low, fifth, half, most, high = np.percentile(numbers, [0, 5, 50, 95, 100]).tolist()
    return {"mean": float(numbers.mean()), "min": low, "5%": fifth, "median": half, "95%": most, "max": high}


def _thresholds(scores: np.ndarray, samples: int) -> list[dict[str, float]]:
    """What `min_clip_score` would keep, at steps between the lowest score and the highest."""
    if not len(scores):
        return []
    ordered = np.sort(scores)
    steps = np.linspace(ordered[0], ordered[-1], _THRESHOLDS + 1)
    kept = len(ordered) - np.searchsorted(ordered, steps.astype(np.float32), side="left")
    rows = zip(steps.tolist(), kept.tolist(), strict=True)
    return [
        {"min_clip_score": float(f"{step:.6g}"), "samples": count, "share": count / samples} for step, count in rows
    ]
