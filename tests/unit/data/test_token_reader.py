"""Where a shard is entered in the middle, no more is read than must be."""

import numpy as np
import pytest

from dalle_torch.data import token_reader
from dalle_torch.data.parquet import python_values
from dalle_torch.data.sources import RawSample
from dalle_torch.data.token_reader import TokenReader
from dalle_torch.data.token_shard import OFFSET_STRIDE, PicturedSample, TokenShardWriter, text_members
from dalle_torch.data.tokens import TokenShard
from tests.shard_files import CODEBOOK, CODES, codes_of_number, number_of_codes, token_parquet

READER = TokenReader(image_length=CODES, codebook_size=CODEBOOK, text="", vocabulary=100, max_length=12)
COUNT = 2 * OFFSET_STRIDE + 50


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(path, offsets) of a shard of `COUNT` samples."""
    path = tmp_path_factory.mktemp("written") / "a.tar"
    with TokenShardWriter(path) as shard:
        for first in range(0, COUNT, 100):
            numbers = range(first, min(first + 100, COUNT))
            samples = [RawSample(f"{n:04d}", b"", f"n{n}") for n in numbers]
            batch = [PicturedSample(s.key, np.zeros(0), text_members(s, "x", (1, 1), None)) for s in samples]
            shard.write(batch, np.stack([codes_of_number(n) for n in numbers]))
    return path, tuple(shard.offsets)


def read(shard, first, count):
    items = list(READER.read(shard, first, count))
    assert not [item.bad for item in items if item.bad]
    return [number_of_codes(np.frombuffer(item.codes, "<u2")) for item in items]


@pytest.mark.parametrize(
    "first", [0, 1, OFFSET_STRIDE - 1, OFFSET_STRIDE, OFFSET_STRIDE + 1, 2 * OFFSET_STRIDE, COUNT - 3]
)
@pytest.mark.parametrize("known", [0, 1, 2, 3])
def test_from_anywhere_with_any_offsets_known(first, known, written):
    path, offsets = written
    assert len(offsets) == 3
    shard = TokenShard(str(path), path.stat().st_size, COUNT, False, None, offsets[:known])
    assert read(shard, first, 3) == [first, first + 1, first + 2]


def test_offsets_save_reading(written, monkeypatch):
    path, offsets = written
    begun = []
    samples = token_reader.TarReader.samples

    def watched(self, offset=0):
        begun.append(offset)
        return samples(self, offset)

    monkeypatch.setattr(token_reader.TarReader, "samples", watched)
    shard = TokenShard(str(path), path.stat().st_size, COUNT, False, None, offsets)
    read(shard, 2 * OFFSET_STRIDE + 10, 1)
    assert begun == [offsets[2]] and offsets[2] > path.stat().st_size // 2


def test_wrong_offsets_are_damage_and_no_more(written):
    path, _ = written
    for offset in (7, 1 << 40, 512 * 3):
        shard = TokenShard(str(path), path.stat().st_size, COUNT, False, None, (0, offset, offset))
        items = list(READER.read(shard, OFFSET_STRIDE, 2))
        assert len(items) == 2


@pytest.mark.parametrize("first", [0, 6, 7, 20, 29])
def test_parquet_from_any_row(first, tmp_path):
    path = token_parquet(tmp_path / "a.parquet", range(30))
    assert read(TokenShard(str(path), path.stat().st_size, 30, True), first, 1) == [first]
    assert read(TokenShard(str(path), path.stat().st_size, 30, True), first, 30 - first) == list(range(first, 30))


def test_values_of_parquet_that_python_cannot_hold():
    import pyarrow as pa

    text = pa.array([b"a", b"\xff", None], pa.binary()).view(pa.string())
    assert python_values(text) == ["a", b"\xff", None]
    assert python_values(pa.StructArray.from_arrays([text], ["b"])) == [{"b": "a"}, {"b": b"\xff"}, {"b": None}]
    assert python_values(pa.array([0, 1 << 60], pa.int64()).view(pa.timestamp("s")))[1] is None
    assert python_values(pa.array([[1, None], None, []], pa.list_(pa.int8()))) == [[1, None], None, []]
