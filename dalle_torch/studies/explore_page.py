"""The page of what a data set holds.

Owns: what is shown of it, and how. Does not own: the figures (`explore`), near duplicates (`duplicates`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from dalle_torch.reports import charts
from dalle_torch.reports.html import Page

_BINS: Final = 40
_MOST_WORDS: Final = 80
"""Longer captions are counted, and not drawn."""

Decode = Callable[[Sequence[np.ndarray]], list[Image.Image]]
"""Codes of pictures to pictures."""


@dataclass(frozen=True)
class Shown:
    """A sample that may be shown."""

    key: str
    caption: str
    score: float
    picture: np.ndarray | None
    codes: np.ndarray | None


def explore_page(
    result: Mapping[str, Any], values: Mapping[str, np.ndarray], shown: Sequence[Shown], decode: Decode | None
) -> Page:
    """The page.

    Args:
        result: what `explore.json` holds.
        values: "score" of the samples that have one, and "words" of each caption, float32.
        shown: samples, in the order of their scores where they have any.
        decode: makes pictures of codes; None shows none.
    """
    page = Page("Data set", " ".join(result["data"]))
    page.paragraph(
        f"{result['samples']:,} samples; {sum(result['skipped'].values()):,} could not be read"
        + "".join(f"; {reason}: {count:,}" for reason, count in result["skipped"].items())
    )
    scores = values["score"].astype(np.float64)
    if len(scores):
        page.heading("Scores")
        counts, edges = np.histogram(scores, bins=_BINS)
        page.png(charts.histogram(counts.tolist(), edges.tolist(), x="score"), "histogram of scores")
        page.table(["min_clip_score", "samples kept", "share"], [list(row.values()) for row in result["thresholds"]])
    else:
        page.notice("The samples have no scores; dalle-torch score adds them.")
    page.heading("Samples" + (" from the lowest score to the highest" if len(scores) else ""))
    _samples(page, shown, decode, bool(len(scores)))
    page.heading("Captions")
    _captions(page, result, values["words"].astype(np.float64))
    page.heading("Duplicates")
    _duplicates(page, result)
    return page


def _captions(page: Page, result: Mapping[str, Any], lengths: np.ndarray) -> None:
    names = ("caption_characters", "caption_words", "caption_tokens")
    known = [(name.removeprefix("caption_"), result[name]) for name in names if result[name]]
    page.table(["length in", *known[0][1]], [[name, *spread.values()] for name, spread in known])
    counts, edges = np.histogram(lengths, bins=np.arange(0, min(lengths.max(), _MOST_WORDS) + 2))
    beyond = int((lengths > edges[-1]).sum())
    page.png(charts.histogram(counts.tolist(), edges.tolist(), x="words of a caption"), "histogram of lengths")
    if beyond:
        page.paragraph(f"{beyond:,} longer captions are not shown")
    page.table(["word", "times"], [list(pair) for pair in result["words"]])


def _duplicates(page: Page, result: Mapping[str, Any]) -> None:
    page.paragraph(f"{result['equal_captions']:,} captions repeat an earlier one, letter case and punctuation aside")
    equal = result["equal_pictures"]
    what = (
        "rows of codes repeat an earlier one"
        if result["near_codes"]
        else "pictures repeat an earlier one to the last byte"
    )
    page.paragraph(f"{equal['samples']:,} {what}, in {equal['groups']:,} groups")
    if equal["first"]:
        page.table(["the same in"], [[", ".join(names)] for names in equal["first"]])
    if near := result["near_pictures"]:
        page.paragraph(
            f"Pairs that look alike: {near['pairs']:,}. Of the {near['of_bits']} bits of their difference hashes at "
            f"most {near['most_bits']} differ."
        )
        if near["first"]:
            page.table(["one", "the other", "bits that differ"], near["first"])
    if near := result["near_codes"]:
        page.paragraph(
            f"Pairs that look alike, of {near['different']:,} different rows of codes: "
            f"{'' if near['all'] else 'at least '}{near['pairs']:,}. Of {near['of_codes']} codes at most "
            f"{near['most_codes']} differ."
        )
        if near["first"]:
            page.table(["one", "the other", "codes that differ"], near["first"])


def _samples(page: Page, shown: Sequence[Shown], decode: Decode | None, scored: bool) -> None:
    codes = [sample.codes for sample in shown if sample.codes is not None]
    if codes and decode is None:
        page.paragraph("Codes are shown as pictures when --vqgan says what decodes them.")
        return
    decoded = iter(decode(codes)) if codes and decode is not None else iter(())
    pictures = [Image.fromarray(s.picture) if s.picture is not None else next(decoded) for s in shown]
    labels = [f"{s.score:.4f}  {s.caption}" if scored else s.caption for s in shown]
    page.gallery(pictures, labels, alts=[s.caption for s in shown], width=112)
