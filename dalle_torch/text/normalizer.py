"""What DALL·E Mini and Mega do to a prompt before it is tokenised: plain, lower-case ASCII with commas for pauses.

The models were trained on text normalised this way, so a prompt that skips it is read worse. The behaviour is that of
borisdayma/dalle-mini, `dalle_mini/model/text.py`, with these differences, all outside what the original handled well:

- `<person>`, which the original replaced by a random one of three phrases, always becomes "a person";
- a hashtag ends at a dot, apostrophe or slash that is kept ("#don't" was cut into letters);
- digits in a hashtag, which the word list lacks, no longer make the rest of it fall into letters ("#2022goals");
- no input makes it fail or take more than time proportional to its length.

Owns: text to text. Does not own: tokens (`tokenizer`), when normalisation applies (`processor`).
"""

import html
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

from dalle_torch.log import get_logger

logger = get_logger(__name__)

Step = Callable[[str], str]
WordCosts = Mapping[str, float]
"""Cost of every word that a hashtag may be cut into; a rarer word costs more."""

WORDS_SOURCE = "dalle-mini/dalle-mini"
WORDS_FILE = "enwiki-words-frequency.txt"
_LONGEST_WORD = 64
"""Words beyond this length are not looked for, which bounds the work on each character of a hashtag."""
_UNKNOWN_COST = 1e6
"""A character outside all known words is the last resort: it costs more than 50,000 of the rarest words."""

# Characters that punctuation would otherwise swallow wait as control characters, of which the text has none by then.
_DOT, _QUOTE, _SLASH = "\x01", "\x02", "\x03"
_RESTORE = str.maketrans({_DOT: ".", _QUOTE: "'", _SLASH: "/"})


def _compile(pattern: str) -> re.Pattern[str]:
    # Lower case comes late, because the fallback for hashtags needs the case; until then matching ignores it.
    return re.compile(pattern, re.ASCII | re.IGNORECASE)


def _replacing(pattern: str, replacement: str | Callable[[re.Match[str]], str], times: int = 1) -> Step:
    expression = _compile(pattern)

    def step(text: str) -> str:
        for _ in range(times):
            text = expression.sub(replacement, text)
        return text

    return step


def _fix_encoding(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text)


# Python refuses to read a number of several thousand digits; none of this length names a character.
_drop_absurd_references = _replacing(r"&#[0-9]{16,};?", "")


def _unescape_html(text: str) -> str:
    for _ in range(2):
        text = html.unescape(_drop_absurd_references(text))
    return text


def _name_emoji(text: str) -> str:
    import emoji

    return emoji.demojize(text)


def _to_ascii(text: str) -> str:
    from unidecode import unidecode

    return unidecode(text)


def _drop_outer_commas(text: str) -> str:
    return text.strip().removesuffix(",").removeprefix(",").strip()


# A repetition of "and"s and separators can be read in one way only (possessive), so that a long one that leads to no
# further person is given up at once.
_PEOPLE = r"<person>(?:[,\s]*+(?:(?:and)++[,\s]*+)?<person>)+"

STEPS_TO_HASHTAGS: tuple[tuple[str, Step], ...] = (
    ("repair wrongly decoded characters", _fix_encoding),
    ("decode HTML entities, twice", _unescape_html),
    ("replace emoji by their names", _name_emoji),
    ("transliterate to ASCII", _to_ascii),
    ("remove control characters", _replacing(r"[\x00-\x08\x0e-\x1f\x7f]", "")),
    ("join masked persons (CC12M)", _replacing(_PEOPLE, " people ")),
    ("name a masked person", _replacing("<person>", " a person ")),
    ("remove a reference at the start (Wikipedia)", _replacing(r"\A\s*\[\d+\]", "")),
    ("remove a reference at the end", _replacing(r"\[\d+\]\s*\Z", "")),
    ("remove HTML tags", _replacing(r"<[^<][^<>]*>", " ")),
    ("remove URLs", _replacing(r"http\S+", "")),
    # Matches do not overlap: the second round takes every other group of digits.
    ("join groups of thousands", _replacing(r"(\d),(\d{3})", r"\1\2", times=2)),
    ("keep dots inside words and numbers", _replacing(r"(\w)\.(\w)", rf"\1{_DOT}\2")),
    ("keep apostrophes of contractions", _replacing(rf"'(?=(?:[stdm]|ll|re|ve)(?![\w{_DOT}]))", _QUOTE)),
    ("keep slashes of dates and fractions", _replacing(r"(\d)/(\d)", rf"\1{_SLASH}\2")),
    ("part hyphenated words", _replacing(rf"(\w)-([\w{_QUOTE}])", r"\1 \2")),
    ("set symbols apart", _replacing(r"([%&/$*])", r" \1 ")),
)  # fmt: skip

STEPS_AFTER_HASHTAGS: tuple[tuple[str, Step], ...] = (
    ("lower case", str.lower),
    ("drop underscores, number signs and backslashes", _replacing(r"[_#\\]", " ")),
    ("one kind of quotation mark", _replacing("['\"`]", ' " ')),
    ("punctuation becomes commas", _replacing(r"[()\[\].,|:;?!=+~\-/{}]", ",")),
    ("bring back what was kept", lambda text: text.translate(_RESTORE)),
    ("collapse characters repeated four times or more, digits excepted", _replacing(r"([^\d])\1{3,}", r"\1")),
    # Spaces are made single first, so that the next two steps look back over one at most.
    ("collapse white space", _replacing(r"\s+", " ")),
    ("merge quotation marks", _replacing(r' ?"[ "]*', ' " ')),
    ("merge commas", _replacing(r" ?,[ ,]*", ", ")),
    ("drop the outer commas", _drop_outer_commas),
)

_HASHTAG = _compile(r"#(\w+)")
_PIECES = re.compile(r"[a-zA-Z0-9]+")
_CASED_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_USABLE_WORD = re.compile(rf"[a-z0-9]{{1,{_LONGEST_WORD}}}")


class TextNormalizer:
    """Prompt to normalised prompt: printable ASCII in lower case that starts with one space.

    Args:
        words_frequency: File of "word count" lines, most frequent word first, by which hashtags are cut into words.
            `None` takes `enwiki-words-frequency.txt` of the hub's `dalle-mini/dalle-mini`, downloaded the first time
            that a prompt has a hashtag. If it cannot be had, hashtags are cut at capitals and digits only, and a
            warning says so once.

    Raises:
        FileNotFoundError: there is no file at `words_frequency`.
    """

    def __init__(self, words_frequency: str | os.PathLike[str] | None = None) -> None:
        self._path = None if words_frequency is None else Path(words_frequency).expanduser()
        if self._path is not None and not self._path.is_file():
            raise FileNotFoundError(f"words_frequency={str(words_frequency)!r} is not a file")
        self._own_costs: WordCosts | None = None

    def __call__(self, text: str) -> str:
        """Normalise one prompt.

        Raises:
            ValueError: `text` is not a string, or the file of words that was given holds none.
        """
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be a string, not of type {type(text).__name__}")
        for _, step in STEPS_TO_HASHTAGS:
            text = step(text)
        text = _HASHTAG.sub(self._expand, text)
        for _, step in STEPS_AFTER_HASHTAGS:
            text = step(text)
        return f" {text}"

    def _expand(self, hashtag: re.Match[str]) -> str:
        costs = self._word_costs()
        pieces = _PIECES.findall(hashtag[1])
        split = split_by_case if costs is None else lambda piece: split_into_words(piece, costs)
        return " ".join(word for piece in pieces for word in split(piece))

    def _word_costs(self) -> WordCosts | None:
        if self._path is None:
            return _hub_word_costs()
        if self._own_costs is None:
            self._own_costs = read_word_costs(self._path)
        return self._own_costs


def read_word_costs(path: Path) -> WordCosts:
    """Costs from a file of "word count" lines: the logarithm of a word's rank.

    Raises:
        ValueError: no line starts with a word of lower-case letters and digits.
    """
    with open(path, encoding="utf-8", errors="replace") as lines:
        words = (line.split(maxsplit=1)[:1] for line in lines)
        costs = {
            word[0]: math.log(rank) for rank, word in enumerate(words, 1) if word and _USABLE_WORD.fullmatch(word[0])
        }
    if not costs:
        raise ValueError(f'{path} holds no words: it must be lines of "word count", most frequent word first')
    return costs


@cache
def _hub_word_costs() -> WordCosts | None:
    """The hub's list, read once a process; a failure is not tried again, for each try may wait for the network."""
    from dalle_torch.storage import resolve

    try:
        return read_word_costs(resolve(WORDS_SOURCE, allow_patterns=[WORDS_FILE]) / WORDS_FILE)
    except (OSError, ValueError) as error:
        logger.warning(
            "hashtags are cut at capitals and digits only, not by known words, because %s of %s is not to be had (%s); "
            "give the file as TextNormalizer(words_frequency=PATH) or connect once",
            WORDS_FILE, WORDS_SOURCE, error,
        )  # fmt: skip
        return None


def split_by_case(text: str) -> list[str]:
    """Cut ASCII letters and digits where a capital or a number begins: "GameOfThrones2" -> Game, Of, Thrones, 2."""
    return _CASED_WORDS.findall(text)


def split_into_words(text: str, costs: WordCosts) -> list[str]:
    """Cut ASCII letters and digits into the known words that cost least together.

    A shortest path over the places between characters, with the logarithm of a word's rank as its length (the
    unigram model with Zipf's law of the wordninja library). Neighbouring numbers are joined again. The work is
    proportional to the length of `text`.
    """
    lowered = text.lower()
    totals, lengths = [0.0], [0]
    for end in range(1, len(text) + 1):
        best, length = totals[end - 1] + costs.get(lowered[end - 1], _UNKNOWN_COST), 1
        for size in range(2, min(end, _LONGEST_WORD) + 1):
            cost = costs.get(lowered[end - size : end])
            if cost is not None and totals[end - size] + cost < best:
                best, length = totals[end - size] + cost, size
        totals.append(best)
        lengths.append(length)
    return _join_numbers(text, _backtrack(lengths))


def _backtrack(lengths: list[int]) -> list[int]:
    """The ends of the words on the best path, first to last."""
    ends = []
    end = len(lengths) - 1
    while end > 0:
        ends.append(end)
        end -= lengths[end]
    return ends[::-1]


def _join_numbers(text: str, ends: Iterable[int]) -> list[str]:
    words: list[str] = []
    start = 0
    for end in ends:
        word = text[start:end]
        if words and word[0].isdigit() and words[-1][-1].isdigit():
            words[-1] += word
        else:
            words.append(word)
        start = end
    return words
