"""Galleries of many prompts: what is drawn, kept, shown, and refused."""

import json
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from dalle_torch.evaluation.base import Judge
from dalle_torch.pipeline.output import read_metadata
from dalle_torch.studies import gallery
from dalle_torch.studies.gallery import file_name, make_gallery
from dalle_torch.studies.prompts import Request
from tests.tiny_pipeline import tiny_pipeline

REQUESTS = [*(Request(f"number {n}") for n in range(6)), Request("ein Bär", 40), Request("", 3), Request("\ud800 half")]


class Brightness:
    """Prefers bright pictures."""

    judge = Judge(name="brightness", source="here", sha256=None, standard=False)

    def score(self, images, prompts):
        return [float(np.asarray(image).mean()) / 255 for image in images]


class Images(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.sources = []
        self.links = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(unquote(dict(attrs)["src"]))
        if tag == "a":
            self.links.append(dict(attrs)["href"])


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def make(pipe, folder, requests=REQUESTS, **options):
    return make_gallery(pipe, requests, folder, **{"scorer": Brightness(), "num_images": 3, "num_best": 2} | options)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_are_those_of_the_pipeline_best_first_at_any_batch_size(pipe, tmp_path, monkeypatch):
    made = make(pipe, tmp_path / "a", batch_size=2)
    assert (made.pictures, made.drawn) == (18, 18)
    make(pipe, tmp_path / "b", batch_size=64)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    rows = rows_of(tmp_path / "a")
    monkeypatch.setattr(pipe, "decoded_at_once", 1)
    for number, request in enumerate(REQUESTS):
        mine = rows[2 * number : 2 * number + 2]
        seed = request.seed or 0
        drawn = pipe(request.prompt, num_images=3, seed=seed, progress=False).images
        scores = Brightness().score(drawn, [])
        order = sorted(range(3), key=lambda i, scores=scores: -scores[i])[:2]
        assert [(row["prompt"], row["seed"] - seed, row["rank"]) for row in mine] == [
            (request.prompt, order[0], 1), (request.prompt, order[1], 2)]  # fmt: skip
        for row, i in zip(mine, order, strict=True):
            assert row["score"] == scores[i] and row["first_seed"] == seed
            assert row["file"] == file_name(request.prompt, seed + i)
            with Image.open(tmp_path / "a" / row["file"]) as image:
                assert image.tobytes() == drawn[i].tobytes()
            assert read_metadata(tmp_path / "a" / row["file"])["prompt"] == request.prompt
    assert rows[0]["settings"]["judge"]["name"] == "brightness" and rows[0]["settings"]["num_images"] == 3
    assert Images(tmp_path / "a" / "gallery.html").sources == [row["file"] for row in rows]


def test_interrupted_at_any_prompt_it_goes_on_to_the_same_end(pipe, tmp_path, monkeypatch):
    make(pipe, tmp_path / "whole", batch_size=3)
    real, left = gallery.write_png, 5

    def interrupted(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "write_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(pipe, tmp_path / "broken", batch_size=3)
    assert len(rows_of(tmp_path / "broken")) == 4
    assert not (tmp_path / "broken" / "gallery.html").exists()
    made = make(pipe, tmp_path / "broken", batch_size=7)
    assert (made.pictures, made.drawn) == (18, 14)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 40, 100000])
def test_a_cut_line_a_damaged_one_and_a_lost_picture_are_drawn_again(pipe, tmp_path, cut):
    make(pipe, tmp_path)
    before = content(tmp_path)
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    assert make(pipe, tmp_path).drawn == (2 if cut < 100000 else 18)
    assert content(tmp_path) == before
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], b"{damaged\n"]))
    assert make(pipe, tmp_path).drawn == 2
    (tmp_path / rows_of(tmp_path)[-1]["file"]).unlink()
    (tmp_path / "pictures" / ".tmp-01234567-x.png").touch()
    assert make(pipe, tmp_path).drawn == 2
    assert content(tmp_path) == before
    assert make(pipe, tmp_path).drawn == 0


def test_more_prompts_draw_only_what_is_new_and_other_settings_are_refused(pipe, tmp_path):
    make(pipe, tmp_path, REQUESTS[:4])
    made = make(pipe, tmp_path, [*REQUESTS[2:], REQUESTS[2]])
    assert (made.pictures, made.drawn) == (14, 10)
    with pytest.raises(ValueError, match=r"of other settings \(condition_scale .*--overwrite"):
        make(pipe, tmp_path, condition_scale=3.0)
    with pytest.raises(ValueError, match="judge"):
        make(pipe, tmp_path, scorer=None, num_best=None)
    assert make(pipe, tmp_path, condition_scale=3.0, overwrite=True).drawn == 18
    assert len(rows_of(tmp_path)) == 18


def test_long_galleries_have_several_pages(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "PICTURES_A_PAGE", 8)
    names = ["gallery.html", "gallery-2.html", "gallery-3.html"]
    made = make(pipe, tmp_path)
    assert [path.name for path in made.pages] == names
    shown = [source for path in made.pages for source in Images(path).sources]
    assert shown == [row["file"] for row in rows_of(tmp_path)]
    links = Images(made.pages[1]).links
    assert [link for link in links if link.endswith(".html")] == ["gallery.html", "gallery-3.html"] * 2
    assert [unquote(link) for link in links if not link.endswith(".html")] == Images(made.pages[1]).sources
    assert [path.name for path in make(pipe, tmp_path, REQUESTS[:4]).pages] == ["gallery.html"]
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["gallery.html"]


def test_long_prompts_that_begin_alike_have_files_of_their_own():
    long = "word " * 50
    assert file_name(long + "a", 0) != file_name(long + "b", 0)
    assert len(file_name(long, 2**63 - 1)) < 150


def test_a_score_that_is_no_number_is_told(pipe, tmp_path):
    class Broken(Brightness):
        def score(self, images, prompts):
            return [float("nan")] * len(images)

    with pytest.raises(ValueError, match="picture of 'number 0' with seed 0 is nan, .* weights of here"):
        make(pipe, tmp_path, scorer=Broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_best": 4}, "num_best=4 must lie between 1 and num_images=3"),
        ({"scorer": None}, "num_best=2 .* needs a scorer"),
        ({"requests": []}, "no prompts"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(pipe, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        make(pipe, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_a_table(pipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from dalle_torch.config import TrackingConfig

    make(pipe, tmp_path, tracking=TrackingConfig(wandb="offline", project="pictures"))
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/gallery*.json")
    found = json.loads(table.read_text())
    assert found["columns"] == ["picture", "prompt", "seed", "rank", "score"]
    assert [row[2:4] for row in found["data"]] == [[row["seed"], row["rank"]] for row in rows_of(tmp_path)]
