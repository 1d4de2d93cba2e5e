"""What `explore` says of a data set whose contents are known."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.studies.explore import explore, near_duplicates
from tests.unit.data.test_scoring import png, write_tar
from tests.unit.reports.test_html import Reader


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    samples = [
        (f"s{n:02d}", {"png": png(5 * n), "txt": f"a picture of {n}".encode(),
                       "json": json.dumps({"clip_score": n / 100}).encode()})
        for n in range(40)
    ]  # fmt: skip
    samples += [
        ("copy", {"png": png(5), "txt": b"A Picture, of 1!", "json": b'{"clip_score": 0.01}'}),
        ("without", {"png": png(250), "txt": b"no score here"}),
        ("broken", {"png": b"x", "txt": b"a"}),
    ]
    write_tar(folder / "0.tar", samples)
    return folder, explore([str(folder)], folder / "out")


def test_figures_are_those_of_the_data(explored):
    folder, result = explored
    assert result["samples"] == 42 and result["skipped"] == {"image_damaged": 1}
    assert result["scores"]["max"] == pytest.approx(0.39) and result["scores"]["without"] == 1
    assert result["equal_captions"] == 1
    assert result["equal_pictures"]["samples"] == 1
    assert result["equal_pictures"]["first"] == [["0.tar:s01", "0.tar:copy"]]
    assert result["words"][:3] == [["a", 41], ["picture", 41], ["of", 41]] or result["words"][0] == ("a", 41)
    assert result["caption_words"]["min"] == 3 and result["caption_words"]["max"] == 4
    assert json.loads((folder / "out" / "explore.json").read_text())["samples"] == 42


def test_thresholds_say_what_the_loader_would_keep(explored):
    _, result = explored
    scores = [n / 100 for n in range(40)] + [0.01]
    assert result["thresholds"][0]["samples"] == 41 and result["thresholds"][-1]["samples"] == 1
    for row in result["thresholds"]:
        kept = sum(score >= row["min_clip_score"] - 1e-6 for score in scores)
        assert row["samples"] == kept and row["share"] == pytest.approx(kept / 42)


def test_there_is_a_line_for_each_sample(explored):
    folder, _ = explored
    with (folder / "out" / "samples.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42 and rows[3]["key"] == "s03" and float(rows[3]["score"]) == 0.03
    assert rows[-1]["score"] == "" and rows[1]["fingerprint"] == rows[40]["fingerprint"]


def test_the_page_shows_samples_along_the_scale_and_opens_offline(explored):
    folder, _ = explored
    reader = Reader()
    reader.feed((folder / "out" / "explore.html").read_text())
    assert len(reader.addresses) > 12 and all(address.startswith("data:image/") for address in reader.addresses)
    shown = [float(text.split()[0]) for text in reader.text if "  a picture of " in text]
    assert len(shown) >= 12 and shown == sorted(shown) and shown[0] < 0.05 and shown[-1] > 0.35


def test_without_scores_it_says_how_to_get_them(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{n}", {"png": png(n), "txt": b"a word"}) for n in range(3)])
    result = explore([str(tmp_path)], tmp_path / "out")
    assert result["scores"] is None and result["thresholds"] == []
    assert "dalle-torch score adds them" in (tmp_path / "out" / "explore.html").read_text()


def test_data_without_samples_is_refused_and_leaves_no_table(tmp_path):
    write_tar(tmp_path / "0.tar", [("a", {"png": b"x", "txt": b"a"})])
    with pytest.raises(ValueError, match="not one sample that can be read: image_damaged 1"):
        explore([str(tmp_path)], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12), st.lists(st.integers(0, 63), max_size=3, unique=True)
)
def test_every_near_pair_is_found_and_no_other(values, flipped):
    changed = values[0]
    for bit in flipped:
        changed ^= 1 << bit
    named = [(value, str(row)) for row, value in enumerate([*values, changed])]
    expected = {
        (a[1], b[1]): (a[0] ^ b[0]).bit_count()
        for i, a in enumerate(named)
        for b in named[i + 1 :]
        if 0 < (a[0] ^ b[0]).bit_count() <= 3
    }
    assert {(one, other): bits for one, other, bits in near_duplicates(named)} == expected
