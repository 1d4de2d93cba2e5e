"""What a folder of shards says about itself, and what is believed of it."""

import json
from dataclasses import replace

import pytest

from dalle_torch.data.manifest import Manifest, Settings, ShardFolder, ShardRecord

SETTINGS = Settings(vqgan="a" * 64, resolution=16, image_length=16, codebook_size=20, dtype="float32")


def record(folder, name, size=3, **values):
    (folder / name).write_bytes(bytes(size))
    return ShardRecord(**{"name": name, "source": name, "samples": 2, "bytes": size, "sha256": "x"} | values)


@pytest.fixture
def folder(tmp_path):
    folder = ShardFolder(str(tmp_path))
    for name in ("0.tar", "1.tar"):
        folder.write_record(record(tmp_path, name, skipped={"no_image": ["k"]}, offsets=[0]))
    return folder


def test_it_is_the_sum_of_the_records(folder, tmp_path):
    manifest = folder.write_manifest(SETTINGS, ["0.tar", "1.tar", "2.tar"])
    assert (manifest.samples, manifest.skipped, manifest.complete) == (4, {"no_image": 2}, False)
    assert folder.manifest() == manifest
    assert folder.write_manifest(SETTINGS, ["1.tar", "0.tar"]).complete
    assert json.loads((tmp_path / "manifest.json").read_text())["bytes"] == 6


def test_it_sums_up_no_shards_of_two_settings(folder, tmp_path):
    folder.write_record(record(tmp_path, "2.tar", settings=SETTINGS.digest))
    assert len(folder.write_manifest(SETTINGS, []).shards) == 3
    other = replace(SETTINGS, caption_key="alt")
    with pytest.raises(ValueError, match=rf"two settings: 2.tar \(one of 1\) was made with {SETTINGS.digest}, and"):
        folder.write_manifest(other, [])
    assert folder.manifest().settings == SETTINGS


def test_a_record_counts_only_with_its_shard_whole(folder, tmp_path):
    (tmp_path / "1.tar").write_bytes(b"12")
    (tmp_path / "records" / "junk.json").write_text("{")
    (tmp_path / "records" / "list.json").write_text("[1]")
    (tmp_path / "records" / ".tmp-0-2.tar.json").write_text("{")
    assert list(folder.records()) == ["0.tar"]
    (tmp_path / "0.tar").unlink()
    assert folder.records() == {}


@pytest.mark.parametrize(
    "values",
    [{"name": ["0.tar"]}, {"name": None}, {"samples": "2"}, {"bytes": [3]}, {"skipped": ["k"]}, {"skipped": {"x": 3}},
     {"offsets": None}, {"settings": {}}, {"source": 1}, {"sha256": 1}, {"source_bytes": "1"}],
)  # fmt: skip
def test_a_record_that_encode_cannot_have_written_does_not_count(values, folder, tmp_path):
    path = tmp_path / "records" / "0.tar.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert list(folder.records()) == ["1.tar"]


@pytest.mark.parametrize("name", ["out[1]", "a*", "b?", "{c,d}"])
def test_a_folder_whose_name_looks_like_a_pattern(name, tmp_path):
    (tmp_path / name).mkdir()
    folder = ShardFolder(str(tmp_path / name))
    for shard in ("0.tar", "1[2].tar"):
        folder.write_record(record(tmp_path / name, shard))
    assert list(folder.records()) == ["0.tar", "1[2].tar"]
    assert folder.write_manifest(SETTINGS, ["0.tar", "1[2].tar"]).complete


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is no manifest of token shards"),
        ('{"format": "other.2"}', "its format is 'other.2', and 'dalle_torch.tokens.1' is read here"),
        ('{"format": "dalle_torch.tokens.1"}', "KeyError: 'settings'"),
        ('{"format": "dalle_torch.tokens.1", "settings": {"x": 1}}', "unexpected keyword argument 'x'"),
        ("[" * 100_000, "RecursionError"),
        ("3", "TypeError"),
    ],
)
def test_what_is_no_manifest(text, message, folder, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        folder.manifest()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_manifest_is_none(tmp_path):
    assert ShardFolder(str(tmp_path)).manifest() is None
    assert ShardFolder(str(tmp_path / "nowhere")).manifest() is None


def test_a_manifest_survives_the_way_through_json():
    one = ShardRecord(name="ä.tar", source="s", samples=0, bytes=1, sha256="", skipped={"x": ["\ud800"]})
    manifest = Manifest(settings=SETTINGS, shards=[one], complete=True)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def test_of_hosts_that_finish_at_once_the_last_manifest_is_whole(folder, tmp_path, monkeypatch):
    other, names = ShardFolder(str(tmp_path)), ["0.tar", "1.tar", "2.tar"]
    write, turns = ShardFolder.write_text, []

    def interleaved(self, name, text):
        if self is folder and not turns:
            # Between this host's look at the records and its manifest.
            turns.append(1)
            other.write_record(record(tmp_path, "2.tar"))
            assert other.write_manifest(SETTINGS, names).complete
        write(self, name, text)

    monkeypatch.setattr(ShardFolder, "write_text", interleaved)
    assert folder.write_manifest(SETTINGS, names).complete
    assert [shard.name for shard in other.manifest().shards] == names
