"""Pictures on disk: names, metadata, sheets."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalle_torch.pipeline.output import (
    METADATA_KEY,
    PARAMETERS_KEY,
    DallePipelineOutput,
    apply_safety,
    make_grid,
    read_metadata,
    slug,
    write_png,
)

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def output(prompts, **changes):
    fields = {
        "images": [Image.new("RGB", (8, 8), COLOURS[index % 6]) for index in range(len(prompts))],
        "prompts": prompts,
        "seeds": list(range(len(prompts))),
        "tokens": torch.zeros(len(prompts), 4, dtype=torch.int64),
        "withheld": [False] * len(prompts),
        "settings": {"condition_scale": 10.0, "top_k": None, "model": "tiny", "model_hash": "sha256:00"},
    }
    return DallePipelineOutput(**fields | changes)


@given(st.text(alphabet=st.characters(), max_size=300))
def test_slugs_are_safe_file_names(prompt):
    name = slug(prompt)
    assert name
    assert len(f"{name}-{2**63}-99.png".encode()) <= 255
    assert not set(name) & set('/\\:*?"<>|. \0')
    assert name.isprintable()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A cat, sitting!", "a-cat-sitting"),
        ("", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("Ein Bär", "ein-bär"),
        ("x" * 500, "x" * 60),
        ("word " * 100, "-".join(["word"] * 12)),
        ("\0\n\t", "picture"),
    ],
)
def test_slugs(prompt, expected):
    assert slug(prompt) == expected


def test_metadata_come_back(tmp_path):
    prompt = 'a "cat" \ud800 ☃\nwith\x07 control characters'
    about = output([prompt]).metadata(0)
    write_png(tmp_path / "a.png", Image.new("RGB", (4, 4), "red"), about)
    assert read_metadata(tmp_path / "a.png") == about
    with Image.open(tmp_path / "a.png") as image:
        assert image.text[PARAMETERS_KEY].splitlines()[-1] == (
            "Seed: 0, Condition scale: 10.0, Top k: None, Model: tiny, Model hash: sha256:00"
        )
        assert json.loads(image.text[METADATA_KEY])["prompt"] == prompt
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_without_metadata_says_so(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=METADATA_KEY):
        read_metadata(tmp_path / "a.png")


def test_saving_replaces_nothing_unless_told(tmp_path):
    drawn = output(["a cat", "a cat", "a dog"], seeds=[0, 0, 0])
    first = drawn.save(tmp_path)
    assert [path.name for path in first] == ["a-cat-0.png", "a-cat-0-2.png", "a-dog-0.png", "grid.png"]
    second = drawn.save(tmp_path)
    assert [path.name for path in second] == ["a-cat-0-3.png", "a-cat-0-4.png", "a-dog-0-2.png", "grid-2.png"]
    changed = output(["a dog"], seeds=[0], images=[Image.new("RGB", (8, 8), "white")])
    assert [path.name for path in changed.save(tmp_path, overwrite=True)] == ["a-dog-0.png"]
    with Image.open(tmp_path / "a-dog-0.png") as image:
        assert image.getpixel((0, 0)) == (255, 255, 255)
    assert len(list(tmp_path.iterdir())) == 8


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        output(["a"]).save(tmp_path / "file")
    # A mode that PNG does not have: the writer fails half-way.
    with pytest.raises(OSError):
        write_png(tmp_path / "b.png", Image.new("CMYK", (4, 4)), {"prompt": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_grid_has_a_row_for_each_prompt():
    assert output(["a", "a", "a", "b", "b", "b"]).grid().size == (3 * 8 + 2 * 2, 2 * 8 + 2)
    assert output(["a"] * 5).grid().size == (3 * 8 + 2 * 2, 2 * 8 + 2)
    assert output(["a", "b"]).grid(columns=2).size == (2 * 8 + 2, 8)


def test_the_grid_shows_every_picture_in_order():
    sheet = output(["a"] * 6).grid(columns=3)
    centres = [sheet.getpixel((4 + 10 * (index % 3), 4 + 10 * (index // 3))) for index in range(6)]
    assert centres == [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS]


def test_frames_and_labels():
    images = output(["a"] * 2).images
    sheet = make_grid(images, columns=2, frames=["lime", "crimson"], labels=["one", "two words wrap here"], scale=4)
    assert sheet.getpixel((1, 1)) == (0, 255, 0)
    assert sheet.getpixel((sheet.width - 2, 1)) == (220, 20, 60)
    label = sheet.crop((3, 39, 35, sheet.height)).convert("L")
    assert label.getextrema()[0] < 100, "there is dark text below the picture"


@pytest.mark.parametrize(("images", "columns"), [([], None), ([Image.new("RGB", (2, 2))], 0)])
def test_grids_that_cannot_be_are_refused(images, columns):
    with pytest.raises(ValueError):
        make_grid(images, columns=columns)


def test_safety_hides_replaces_and_lets_through():
    drawn = output(["a", "b", "c"])
    checked = apply_safety(drawn, lambda images, prompts: [prompt != "b" for prompt in prompts])
    assert checked.withheld == [False, True, False]
    assert checked.images[0] is drawn.images[0]
    assert checked.images[1].getextrema() == ((0, 0),) * 3
    blurred = Image.new("RGB", (8, 8), "white")
    replaced = apply_safety(drawn, lambda images, prompts: [images[0], blurred, images[2]])
    assert replaced.withheld == [False, True, False]
    assert replaced.images[1] is blurred
    with pytest.raises(ValueError, match="2 results for 3 pictures"):
        apply_safety(drawn, lambda images, prompts: [True, True])
