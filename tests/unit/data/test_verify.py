"""A folder whose shards are as written passes; whatever became of one is named, all of it at once."""

import json

import pytest

from dalle_torch.data.manifest import Settings, ShardFolder, ShardRecord
from dalle_torch.data.verify import verify
from dalle_torch.storage import sha256_of
from tests.shard_files import token_tar

SETTINGS = Settings(vqgan="", resolution=16, image_length=16, codebook_size=20, dtype="")
NAMES = [f"{number}.tar" for number in range(5)]


@pytest.fixture(params=["out", "out[1]"])
def folder(request, tmp_path):
    path = tmp_path / request.param
    output = ShardFolder(str(path))
    for name in NAMES:
        shard = token_tar(path / name, range(3))
        size, content = shard.stat().st_size, sha256_of(shard)
        output.write_record(ShardRecord(name=name, source="x", samples=3, bytes=size, sha256=content))
    output.write_manifest(SETTINGS, NAMES)
    return path


def test_a_folder_as_it_was_written(folder):
    found = verify(ShardFolder(str(folder)))
    assert (found.shards, found.samples, found.complete) == (5, 15, True)
    assert found.bytes == sum((folder / name).stat().st_size for name in NAMES)
    found = verify(ShardFolder(f"file://{folder}"))
    assert found.shards == 5


def test_all_that_is_wrong_is_named_at_once(folder):
    (folder / "0.tar").unlink()
    (folder / "1.tar").write_bytes(b"half")
    data = bytearray((folder / "3.tar").read_bytes())
    data[1000] ^= 1
    (folder / "3.tar").write_bytes(data)
    token_tar(folder / "new.tar", [1])
    (folder / ".tmp-0123abcd-9.tar").write_bytes(b"at work")
    with pytest.raises(ValueError) as caught:
        verify(ShardFolder(str(folder)))
    line = str(caught.value)
    assert line.startswith(
        f"{folder}: 4 of 6 shards are not what the manifest says: 0.tar is not there; 1.tar has 4 by"
    )
    assert "; 3.tar has sha256 " in line and "; new.tar is in no record. Remove them and run the same" in line
    assert "2.tar" not in line and "4.tar" not in line and "\n" not in line


def test_records_that_no_manifest_has_summed_up_count_too(folder):
    shard = token_tar(folder / "5.tar", range(4))
    ShardFolder(str(folder)).write_record(
        ShardRecord(name="5.tar", source="x", samples=4, bytes=shard.stat().st_size, sha256=sha256_of(shard))
    )
    assert verify(ShardFolder(str(folder))).samples == 19
    (folder / "records" / "5.tar.json").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 shards are not what the manifest says: 5.tar is in no record\."):
        verify(ShardFolder(str(folder)))


@pytest.mark.parametrize("values", [{"name": ["x"]}, {"samples": "3"}, {"bytes": None}, {"sha256": 3}])
def test_a_manifest_that_cannot_be_true(values, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][2] |= values
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="1 of [56] shards are not what the manifest says"):
        verify(ShardFolder(str(folder)))


def test_no_folder_of_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no manifest.json: is it a folder that encode wrote"):
        verify(ShardFolder(str(tmp_path)))
