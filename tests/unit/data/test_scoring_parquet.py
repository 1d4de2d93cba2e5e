"""Scores written into parquet files of pictures and of codes."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dalle_torch.config import DataConfig
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.parquet import RowWriter
from dalle_torch.data.survey import survey
from dalle_torch.data.text import TextEncoder
from tests.tiny_pipeline import tiny_processor, tiny_vqgan
from tests.unit.data.test_scoring import Brightness, png, score

ROWS = 70
"""More than a batch of rows, and more than two chunks of the judge."""


@pytest.fixture(scope="module")
def vqgan():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_vqgan()


def write(path, columns, **options):
    path.parent.mkdir(exist_ok=True)
    table = pa.table(columns).replace_schema_metadata({"written": "by a test"})
    pq.write_table(table, path, **options)
    return path.parent


def pictures(rows=ROWS, **more):
    return {
        "image": [{"bytes": png(3 * n), "path": f"{n}.png"} for n in range(rows)],
        "caption": [f"number {n}" for n in range(rows)],
        "tags": [["a"] * (n % 3) for n in range(rows)],
    } | more


def test_all_columns_stay_and_the_score_is_one_more(tmp_path):
    folder = write(tmp_path / "photos" / "0.parquet", pictures(), row_group_size=13)
    (result,) = score(folder, tmp_path / "out", Brightness())
    assert result.samples == ROWS and not result.skipped
    before, after = (pq.read_table(place / "0.parquet") for place in (folder, tmp_path / "out"))
    assert after.drop_columns(["clip_score"]).equals(before) and after.schema.metadata == before.schema.metadata
    # Pictures come as PNG and are resized, so that a flat one stays flat.
    assert after["clip_score"].to_pylist() == pytest.approx([3 * n / 255 for n in range(ROWS)], abs=1e-6)
    assert pq.ParquetFile(tmp_path / "out" / "0.parquet").num_row_groups == 1


def test_what_is_there_is_kept_until_the_judge_changes(tmp_path):
    columns = pictures(8, clip_score=[7.0] * 8)
    for number in range(3):
        folder = write(tmp_path / "photos" / f"{number}.parquet", columns)
    out = tmp_path / "out"
    score(folder, out, Brightness())
    (out / "1.parquet").unlink()
    score(folder, out, partly := Brightness())
    assert partly.seen == 8
    score(folder, out, other := Brightness(sha256="b"))
    assert other.seen == 24
    table = pq.read_table(out / "1.parquet")
    # A score that was there is another judge's.
    assert table.schema.names.count("clip_score") == 1 and max(table["clip_score"].to_pylist()) < 1


def test_rows_that_cannot_be_scored_are_left_out_by_reason(tmp_path):
    columns = {
        "picture": [png(1), None, b"no picture", png(2), png(3)],
        "words": ["a", "b", "c", None, "e"],
    }
    folder = write(tmp_path / "photos" / "0.parquet", columns)
    options = {"caption_key": "words", "image_key": "picture", "max_bad_fraction": 0.7}
    (result,) = score(folder, tmp_path / "out", Brightness(), **options)
    assert result.skipped == {
        "no_image": ["000000001"], "image_damaged": ["000000002"], "no_caption": ["000000003"],
    }  # fmt: skip
    assert pq.read_table(tmp_path / "out" / "0.parquet")["words"].to_pylist() == ["a", "e"]


def test_codes_are_decoded_and_training_filters_by_the_column(tmp_path, vqgan):
    codes = np.random.default_rng(0).integers(0, 20, (12, 16))
    rows = [*codes.tolist(), [99] * 16, None]
    columns = {"caption": [f"number {n}" for n in range(14)], "encoding": rows}
    folder = write(tmp_path / "tokens" / "0.parquet", columns)
    (result,) = score(folder, tmp_path / "out", Brightness(), vqgan, max_bad_fraction=0.2)
    assert result.skipped == {"codes_malformed": ["000000012", "000000013"]}
    table = pq.read_table(tmp_path / "out" / "0.parquet")
    scores = table["clip_score"].to_pylist()
    assert len(set(scores)) == 12
    with torch.no_grad():
        images = vqgan.pixels_to_images(vqgan.decode(torch.from_numpy(codes)))
    # The network decodes chunks of 32 and not of 12, which round differently.
    assert scores == pytest.approx(Brightness().score(images, [""] * 12), abs=1e-3)
    threshold = sorted(scores)[6]
    config = DataConfig(
        train=[str(tmp_path / "out")], lanes=1, workers=0, shuffle_buffer=0, min_clip_score=threshold
    )  # fmt: skip
    data = TokenData(config=config, text=TextEncoder(tiny_processor()), image_length=16, codebook_size=20, batch_size=3)
    kept = {tuple(row) for row, value in zip(table["encoding"].to_pylist(), scores, strict=True) if value >= threshold}
    assert {tuple(row.tolist()) for row in next(iter(data.training_loader())).inputs["labels"]} <= kept


def test_explore_reads_what_was_scored(tmp_path):
    folder = write(tmp_path / "photos" / "0.parquet", pictures(5))
    score(folder, tmp_path / "out", Brightness())
    found = [seen.score for seen in survey([str(tmp_path / "out")], Counter(), score_key="clip_score")]
    assert found == pytest.approx([3 * n / 255 for n in range(5)], abs=1e-6)


def test_damage_is_one_shard_less_and_told(tmp_path, caplog):
    folder = write(tmp_path / "photos" / "0.parquet", pictures(20))
    (folder / "1.parquet").write_bytes((folder / "0.parquet").read_bytes()[:-9])
    first, second = score(folder, tmp_path / "out", Brightness())
    assert first.samples == 20 and second.skipped == {"shard_damaged": ["1.parquet"]}
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["0.parquet"]
    with pytest.raises(ValueError, match=r"shard_damaged: 1.* in 1.parquet"):
        score(folder, tmp_path / "strict", Brightness(), max_bad_fraction=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_key": "words"}, "has no column words; it has: image, caption, tags"),
        ({"image_key": "picture"}, "has no column picture"),
        ({"key": "caption"}, "would be written over its column caption"),
    ],
)
def test_columns_that_cannot_be_are_told(tmp_path, options, message):
    folder = write(tmp_path / "photos" / "0.parquet", pictures(2))
    with pytest.raises(ValueError, match=message):
        score(folder, tmp_path / "out", Brightness(), **options)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_rows_are_written_in_groups_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_torch.data.parquet._GROUP_ROWS", 6)
    batch = pa.record_batch({"a": list(range(8))})
    with RowWriter(tmp_path / "x.parquet", batch.schema, "b") as rows:
        for place in range(0, 8, 2):
            rows.write([(batch, place), (batch, place + 1), (batch, 0)], [0.5, 1.5, 2.5])
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert file.num_row_groups == 2 and file.read()["a"].to_pylist() == [0, 1, 0, 2, 3, 0, 4, 5, 0, 6, 7, 0]
