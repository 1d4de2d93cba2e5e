"""What `explore` says of a data set whose contents are known."""

import csv
import json

import numpy as np
import pytest

from dalle_torch.data.token_shard import to_npy
from dalle_torch.studies.explore import explore
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


def test_codes_that_differ_in_few_places_are_told_with_the_threshold(tmp_path):
    random = np.random.default_rng(0)
    rows = random.integers(0, 500, (30, 256))
    rows[7], rows[8], rows[9] = rows[3], rows[3], rows[4]
    rows[8, :32] += 1
    rows[9, :33] += 1
    write_tar(tmp_path / "0.tar", [(f"{n:02d}", {"npy": to_npy(row.astype(np.uint16)), "txt": b"a word"})
                                   for n, row in enumerate(rows)])  # fmt: skip
    result = explore([str(tmp_path)], tmp_path / "out")
    assert result["near_codes"] == {
        "pairs": 1, "all": True, "most_codes": 32, "of_codes": 256, "different": 29,
        "first": [("0.tar:03", "0.tar:08", 32)],
    }  # fmt: skip
    assert result["near_pictures"] is None and result["equal_pictures"]["first"] == [["0.tar:03", "0.tar:07"]]
    page = (tmp_path / "out" / "explore.html").read_text()
    assert "Pairs that look alike, of 29 different rows of codes: 1. Of 256 codes at most 32 differ." in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["explore.html", "explore.json", "samples.csv"]
