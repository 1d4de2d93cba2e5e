"""Normalisation of any input: total, plain ASCII, bounded work; hashtags with and without a list of words."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.text import TextNormalizer, normalizer
from dalle_torch.text.normalizer import read_word_costs, split_by_case, split_into_words
from tests.helpers import GOLDENS

WORDS = GOLDENS / "text" / "words-frequency.txt"
LENGTH = 10_000

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=200)
PARTS = [
    "<person>", "and", ",", ".", "#", "'", '"', "`", "-", "/", "_", "\\", "<", ">", "&", "&amp;", "&#", "&#x1;", ";",
    "1", "000", "a", "s", "ll", "T", "http", "[1]", " ", "\n", "\t", "\x00", "\x01", "\x02", "\x03", "\x1c", "\x7f",
    "\x85", "\xa0", "\u2028", "\u200b", "\u200d", "\u202e", "\ufeff", "\ufffd", "\ud83d", "\ude3a", "😺", "👍🏽",
    "é", "אב",
]  # fmt: skip
TRICKY = st.lists(st.sampled_from(PARTS), max_size=60).map("".join)
HOSTILE = [
    "", " ", "\x00", "#", "#_", "'", '"', ",", "<", "&#", "[1]", "http", "\ud800",
    *(unit * (LENGTH // len(unit)) for unit in (
        " ", "\n", "\x00", "\x01", "\x1b", "\x7f", "\u200b", "\u202e", "א", "猫", "😺", "\ud800", "\udfff\ud800",
        "a", "1", "#", "#a", "#a1", "a.", "1,000,", "1/", "'s", "''", '" ', ", ", "<", "<>", "<a", "<person>",
        "<person>and", "[1] ", "[", "http", "&", "&amp;", "&#38;#38;", "â€™", "\x0c\x85\u2028", "xtokx",
    )),
    "#" + "a" * LENGTH, "#" + "catbeach" * (LENGTH // 8), "#" + "1a" * (LENGTH // 2), "<person>" + ", " * LENGTH,
    "<person>" + "and" * LENGTH, "<" + "a" * LENGTH, "[" + "1" * LENGTH, "http" + "a" * LENGTH,
    "&#" + "9" * LENGTH, "&#" + "0" * LENGTH + "65;", "&amp;#" + "9" * LENGTH, "&#x" + "f" * LENGTH + ";",
]  # fmt: skip


normalize = TextNormalizer(WORDS)


def assert_normal(text: str) -> None:
    assert text[0] == " "
    assert text == " " + text.strip()
    assert all(" " <= character <= "~" for character in text)
    assert text == text.lower()
    assert "  " not in text
    assert not set(text) & set("()[]{}|:;?!+~#_\\`")


@settings(deadline=None)
@given(text=ANY_TEXT | TRICKY)
def test_any_text_becomes_plain_ascii(text: str) -> None:
    assert_normal(normalize(text))


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{len(text)}-{text[:8]!r}")
def test_hostile_text_becomes_plain_ascii(text: str) -> None:
    assert_normal(normalize(text))


@settings(deadline=None)
@given(words=st.lists(st.text("bcdefghijklmnopqruvwxyz", min_size=1, max_size=8), max_size=8))
def test_plain_words_are_settled_after_one_pass(words: list[str]) -> None:
    once = normalize(", ".join(words))
    assert normalize(once) == once


@settings(deadline=None)
@given(text=st.text("abc XYZ,.()!'\"-", max_size=60))
def test_case_and_outer_space_do_not_matter(text: str) -> None:
    assert normalize(text.upper()) == normalize(text.lower()) == normalize(f" \n{text}\t ")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("#cat's", " cat's"),
        ("#cat.dog", " cat.dog"),
        ("#2022cats", " 2022 cats"),
        ("#cats2022", " cats 2022"),
        ("#red_house", " red house"),
        ("<PERSON> at home", " a person at home"),
        ("<person>, and <person>", " people"),
        ("\x01\x02\x03 x", " x"),
        ("1,234,567,890,123", " 1234567890123"),
        ("it's.the end", ' it " s.the end'),
        ("HTTP://EXAMPLE.COM/A b", " b"),
        ("&amp;#104;i", " hi"),
        ("\ud83d\ude3a", " grinning cat"),
    ],
)
def test_corner(prompt: str, expected: str) -> None:
    assert normalize(prompt) == expected


def test_examples_of_the_guide_are_true() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "text.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| `(.+?)` \| `(.+?)` \|", guide, re.MULTILINE)
    assert len(examples) > 10
    assert [normalize(prompt) for prompt, _ in examples] == [f" {normal}" for _, normal in examples]


class CountingCosts(dict[str, float]):
    looked_up = 0

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up += 1
        assert len(key) <= normalizer._LONGEST_WORD
        return super().get(key, default)


@pytest.mark.parametrize("length", [100, 1000, LENGTH])
def test_work_on_a_hashtag_is_proportional_to_its_length(length: int) -> None:
    costs = CountingCosts(read_word_costs(WORDS))
    split_into_words("cat1" * (length // 4), costs)
    assert costs.looked_up <= normalizer._LONGEST_WORD * length


def cheapest(text: str, costs: dict[str, float]) -> float:
    """The cost of the best of all ways to cut `text`, each tried."""
    gaps = range(1, len(text))
    totals = []
    for count in range(len(text)):
        for cuts in itertools.combinations(gaps, count):
            places = [0, *cuts, len(text)]
            totals.append(sum(costs.get(text[a:b], math.inf) for a, b in itertools.pairwise(places)))
    return min(totals)


@settings(deadline=None)
@given(
    text=st.text("ab", min_size=1, max_size=9),
    extra=st.dictionaries(st.text("ab", min_size=2, max_size=4), st.floats(0.1, 10), max_size=8),
)
def test_words_found_are_the_cheapest(text: str, extra: dict[str, float]) -> None:
    costs = {"a": 4.0, "b": 5.0} | extra
    words = split_into_words(text, costs)
    assert "".join(words) == text
    assert sum(costs[word] for word in words) == pytest.approx(cheapest(text, costs))


@given(text=st.text("abcXYZ019", max_size=40))
def test_splitting_loses_nothing(text: str) -> None:
    assert "".join(split_into_words(text, {"ab": 1.0, "xyz": 1.0})) == text
    assert "".join(split_by_case(text)) == text


@pytest.mark.parametrize(
    ("hashtag", "words"),
    [
        ("GameOfThrones2", ["Game", "Of", "Thrones", "2"]),
        ("sunsetbeach", ["sunsetbeach"]),
        ("HTMLParser", ["HTML", "Parser"]),
        ("iPhone12Pro", ["i", "Phone", "12", "Pro"]),
        ("AI", ["AI"]),
    ],
)
def test_split_by_case(hashtag: str, words: list[str]) -> None:
    assert split_by_case(hashtag) == words


def test_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a file"):
        TextNormalizer(tmp_path / "none.txt")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00", b"--- 3\nUPPER 2\n"])
def test_list_without_words_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(ValueError, match="holds no words"):
        TextNormalizer(tmp_path / "words.txt")("#cat")


def test_costs_follow_the_rank_of_the_line(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(f"the 9\n\nécole 8\ncat\n{'z' * 65} 1\n")
    assert read_word_costs(tmp_path / "words.txt") == {"the": 0.0, "cat": math.log(4)}


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["a"]])
def test_only_strings_are_normalised(value: Any) -> None:
    with pytest.raises(ValueError, match=f"must be a string, not of type {type(value).__name__}"):
        normalize(value)


def test_normaliser_alone_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'ftfy', 'emoji', 'unidecode', 'huggingface_hub'}"
    code = f"import sys; from dalle_torch.text import TextNormalizer; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
