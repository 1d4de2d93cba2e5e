"""Which shards there are and how many samples they have, and manifests that cannot be true."""

import json

import pytest

from dalle_torch.data import tokens
from dalle_torch.data.manifest import ShardFolder, ShardRecord
from dalle_torch.data.tokens import find_token_shards
from tests.shard_files import CODEBOOK, CODES, token_tar

SETTINGS = {"vqgan": "", "resolution": 16, "image_length": CODES, "codebook_size": CODEBOOK, "dtype": ""}


def with_manifest(folder, complete=True, settings=None, **record):
    """A tar of six samples and a manifest whose record of it is changed."""
    path = token_tar(folder / "a.tar", range(6))
    record = {"name": "a.tar", "source": "x", "samples": 6, "bytes": path.stat().st_size, "sha256": ""} | record
    values = {"format": "dalle_torch.tokens.1", "complete": complete, "shards": [record]}
    values["settings"] = SETTINGS | (settings or {})
    (folder / "manifest.json").write_text(json.dumps(values))
    return path


def find(folder):
    return find_token_shards(str(folder), image_length=CODES, codebook_size=CODEBOOK)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"samples": "abc"}, "a.tar: its record has samples='abc': a whole number of at least 0 is due; remove"),
        ({"samples": -5}, "a.tar: its record has samples=-5: a whole number of at least 0 is due"),
        ({"samples": True}, "samples=True"),
        ({"samples": 10**15}, "samples=1,000,000,000,000,000; its 20,480 bytes hold 40 at most; remove"),
        ({"bytes": None}, "a.tar: its record has bytes=None"),
        ({"offsets": ["x"]}, "a.tar: its record has offsets that are no list of whole numbers"),
        ({"offsets": None}, "a.tar: its record has offsets"),
        ({"name": ["x"]}, "its manifest has ['x'] for the name of a shard"),
        ({"settings": {"codebook_size": "many"}}, "its manifest has codebook_size='many'"),
        ({"settings": {"image_length": "x"}}, "holds pictures of x codes"),
    ],
)
def test_records_that_cannot_be_true(record, message, tmp_path):
    with_manifest(tmp_path, **record)
    with pytest.raises(ValueError) as caught:
        find(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_record_of_another_file_does_not_make_samples(tmp_path):
    with_manifest(tmp_path, samples=10**15, bytes=10**18)
    (shard,) = find(tmp_path)
    assert shard.samples == 6


@pytest.mark.parametrize("complete", [True, False])
def test_a_shard_that_was_cut_off_has_the_samples_of_its_record(complete, tmp_path):
    path = with_manifest(tmp_path, complete, offsets=[0])
    path.write_bytes(path.read_bytes()[:1000])
    (shard,) = find(tmp_path)
    assert (shard.samples, shard.size, shard.offsets) == (6, 1000, ())


@pytest.mark.parametrize("complete", [True, False])
def test_records_count_where_the_manifest_was_not_completed(complete, tmp_path, monkeypatch):
    with_manifest(tmp_path, complete)
    path = token_tar(tmp_path / "b.tar", range(3))
    record = ShardRecord(name="b.tar", source="x", samples=3, bytes=path.stat().st_size, sha256="", offsets=[0])
    ShardFolder(str(tmp_path)).write_record(record)
    counted = []
    monkeypatch.setattr(tokens, "_count_tar", lambda shard: counted.append(shard.name) or 3)
    assert [(shard.samples, shard.offsets) for shard in find(tmp_path)] == [(6, ()), (3, () if complete else (0,))]
    assert counted == (["b.tar"] if complete else [])


def test_a_single_record_that_cannot_be_true(tmp_path):
    path = with_manifest(tmp_path, complete=False)
    record = ShardRecord(name="a.tar", source="x", samples=10**15, bytes=path.stat().st_size, sha256="")
    ShardFolder(str(tmp_path)).write_record(record)
    with pytest.raises(
        ValueError, match="a.tar: its record has samples=1,000,000,000,000,000; its 20,480 bytes hold 40"
    ):
        find(tmp_path)
