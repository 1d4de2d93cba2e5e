"""Captioned pictures out of whatever they are stored in."""

import json
from itertools import islice

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dalle_torch.data.captioned import CaptionedData
from dalle_torch.data.encode import EncodeOptions, encode
from dalle_torch.data.manifest import ShardFolder
from dalle_torch.data.sources import find_parts
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.sampling import sample_scenes
from tests.tiny_pipeline import tiny_vqgan

CODES = {"resolution": 16, "image_length": 16, "codebook_size": 20}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for number in range(3):
        Image.new("RGB", (20, 16), (80 * number, 0, 0)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join([*lines, "{", json.dumps({"file_name": "9.png", "text": "x"})]))
    return folder


def test_pictures_come_as_squares_and_what_is_left_out_is_counted_by_reason(photos):
    data = CaptionedData([str(photos)], **CODES)
    found = list(data.samples())
    assert data.kind == "pictures" and [sample.caption for sample in found] == [f"number {n}" for n in range(3)]
    assert [sample.picture.shape for sample in found] == [(16, 16, 3)] * 3 and found[2].picture[0, 0, 0] == 160
    assert data.skipped == {"bad_json": 1, "no_image": 1}
    assert len(list(data.samples(2))) == 2 and not data.skipped, "a count is of the last pass, as far as it went"


def test_shards_of_codes_are_told_by_what_is_in_them(photos, tmp_path):
    vqgan = tiny_vqgan()
    encode(find_parts([str(photos)], None, "image", 10), ShardFolder(str(tmp_path / "tokens")), vqgan, None,
           EncodeOptions(max_bad_fraction=0.5))  # fmt: skip
    for remove in (False, True):
        if remove:
            (tmp_path / "tokens" / "manifest.json").unlink()
        data = CaptionedData([str(tmp_path / "tokens")], **CODES)
        found = list(data.samples())
        assert data.kind == "codes" and [sample.caption for sample in found] == [f"number {n}" for n in range(3)]
        assert all(sample.codes.shape == (16,) and sample.codes.dtype == np.int64 for sample in found)
    with pytest.raises(ValueError, match="has not one usable sample: codes_malformed 3"):
        list(CaptionedData([str(tmp_path / "tokens")], resolution=16, image_length=9, codebook_size=20).samples())


def test_parquet_files_of_codes_and_of_pictures(tmp_path):
    codes = pyarrow.table({"caption": ["a", "b"], "encoding": [list(range(16)), [99] * 16]})
    pyarrow.parquet.write_table(codes, tmp_path / "codes.parquet")
    data = CaptionedData([str(tmp_path / "codes.parquet")], **CODES)
    (sample,) = data.samples()
    assert data.kind == "codes" and sample.caption == "a" and sample.codes.tolist() == list(range(16))
    assert data.skipped == {"codes_malformed": 1}
    png = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(png)
    pyarrow.parquet.write_table(
        pyarrow.table({"caption": ["a"], "image": [png.read_bytes()]}), tmp_path / "pictures.parquet"
    )
    data = CaptionedData([str(tmp_path / "pictures.parquet")], **CODES)
    assert data.kind == "pictures" and [sample.caption for sample in data.samples()] == ["a"]


def test_shapes_go_on_for_ever_and_are_those_of_their_seed():
    data = CaptionedData(["shapes"], resolution=64, image_length=256, codebook_size=512, seed=4)
    found = list(islice(data.samples(), 150))
    scenes = sample_scenes(150, 4)
    assert [sample.caption for sample in found] == [scene.caption for scene in scenes]
    assert (np.stack([sample.picture for sample in found]) == render(scenes, 4)).all()
    assert data.describe() == {"names": ["shapes"], "kind": "shapes", "seed": 4}


@pytest.mark.parametrize(
    ("names", "limit", "message"),
    [
        ([], None, "no data is named"),
        (["shapes"], 2, "shapes are pictures of 64 x 64, and the model draws 16 x 16"),
        (["nowhere/*.tar"], None, "no shard matches nowhere"),
        (["shapes"], 0, "limit=0 must be at least 1"),
    ],
)
def test_what_cannot_be_read_is_said(names, limit, message):
    with pytest.raises((ValueError, OSError), match=message):
        list(CaptionedData(names, **CODES).samples(limit))
