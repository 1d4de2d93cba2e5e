"""Encoding: equal codes to the network's own, whole shards or none, resumed and shared without a word between hosts."""

import errno
import io
import json
import logging
import re
import sys
import threading
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from dalle_torch.data import encode as encode_module
from dalle_torch.data import encode_progress
from dalle_torch.data.encode import EncodeOptions, encode, fingerprint
from dalle_torch.data.images import DAMAGED
from dalle_torch.data.images import TOO_LARGE as IMAGE_TOO_LARGE
from dalle_torch.data.manifest import ShardFolder
from dalle_torch.data.sources import find_parts
from dalle_torch.data.text import TextEncoder
from dalle_torch.storage import atomic, sha256_of
from tests.shard_files import bomb, captioned, encoded, good_tar, jsonl, picture, read_tar, write_tar
from tests.tiny_pipeline import tiny_processor, tiny_vqgan


@pytest.fixture(scope="module")
def vqgan():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_vqgan()


def run(inputs, output, vqgan, text=None, caption_key=None, **options):
    parts = find_parts([str(name) for name in inputs], caption_key, "image", 4)
    options = EncodeOptions(**{"batch_size": 3, "threads": 2, "caption_key": caption_key} | options)
    return encode(parts, ShardFolder(str(output)), vqgan, text, options)


def codes_of(data):
    return np.load(io.BytesIO(data), allow_pickle=False)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def tars(tmp_path):
    return [good_tar(tmp_path / "in" / f"{index}.tar", count, 10 * index) for index, count in enumerate((5, 3, 4))]


def test_shards_hold_the_networks_own_codes(tars, tmp_path, vqgan):
    report = run(tars, tmp_path / "out", vqgan)
    assert (report.samples, report.shards, report.kept, dict(report.skipped)) == (12, 3, 0, {})
    for path in tars:
        source, shard = read_tar(path), read_tar(tmp_path / "out" / path.name)
        assert list(source) == list(shard)
        for key, members in shard.items():
            assert set(members) == {"txt", "npy", "json"}
            assert members["txt"] == source[key]["txt"]
            codes = codes_of(members["npy"])
            image = Image.open(io.BytesIO(source[key]["jpg"]))
            expected = vqgan.encode(vqgan.images_to_pixels(image))
            assert codes.dtype == np.uint16
            assert np.array_equal(codes, expected[0].numpy())
            assert json.loads(members["json"]) == {"source": path.name, "width": 20, "height": 24}


def test_the_manifest_tells_what_is_there(tars, tmp_path, vqgan):
    write_tar(tmp_path / "in" / "3.tar", [("a", captioned(1)), ("b", {"txt": b"x"}), ("c", captioned(2, jpg=b"junk"))])
    report = run([tmp_path / "in"], tmp_path / "out", vqgan, max_bad_fraction=0.5)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["complete"]) == (13, True)
    assert manifest["skipped"] == {"image_damaged": 1, "no_image": 1} == dict(report.skipped)
    assert manifest["settings"]["resolution"] == 16 and manifest["settings"]["vqgan"] == fingerprint(vqgan)
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["name"]
        assert shard["bytes"] == path.stat().st_size
        assert shard["sha256"] == sha256_of(path)
        assert shard["samples"] == len(read_tar(path))
    assert manifest["shards"][3]["skipped"] == {"no_image": ["b"], "image_damaged": ["c"]}
    assert manifest["bytes"] == sum(shard["bytes"] for shard in manifest["shards"])


def test_every_kind_of_damage_is_skipped_and_counted(tmp_path, vqgan):
    good = picture(0, (64, 64))
    with_exif = Image.Exif()
    with_exif[0x0112] = 6
    samples = [
        ("good", captioned(0)),
        ("cut", captioned(1, jpg=good[: len(good) // 2])),
        ("bomb", {"png": bomb(), "txt": b"x"}),
        ("no-caption", {"jpg": good}),
        ("latin", captioned(2, txt="café".encode("latin-1"))),
        ("empty", captioned(3, jpg=b"")),
        ("good", captioned(4)),
        ("pickle", {"jpg": good, "txt": b"p", "pyd": b"cos\nsystem\n(S'touch /tmp/never'\ntR."}),
        ("rgba", {"png": encoded(Image.new("RGBA", (20, 20), (1, 2, 3, 0)), "PNG"), "txt": b"x"}),
        ("turned", captioned(5, jpg=encoded(Image.new("RGB", (40, 20)), "JPEG", exif=with_exif))),
    ]
    whole = write_tar(tmp_path / "in" / "a.tar", samples).read_bytes()
    (tmp_path / "in" / "b.tar").write_bytes(whole[: len(whole) - 15_000])
    (tmp_path / "in" / "c.tar").write_bytes(b"")
    report = run([tmp_path / "in"], tmp_path / "out", vqgan, max_bad_fraction=1)
    shards = {shard.name: shard for shard in report.manifest.shards}
    assert shards["a.tar"].skipped == {
        DAMAGED: ["cut", "empty"], IMAGE_TOO_LARGE: ["bomb"], "no_caption": ["no-caption"],
        "caption_not_utf8": ["latin"], "duplicate_key": ["good"],
    }  # fmt: skip
    assert list(read_tar(tmp_path / "out" / "a.tar")) == ["good", "pickle", "rgba", "turned"]
    assert "pyd" not in read_tar(tmp_path / "out" / "a.tar")["pickle"]
    assert json.loads(read_tar(tmp_path / "out" / "a.tar")["turned"]["json"])["height"] == 40
    assert shards["b.tar"].skipped["shard_damaged"] == ["b.tar"] and shards["b.tar"].samples >= 1
    assert (shards["c.tar"].samples, shards["c.tar"].skipped) == (0, {"shard_damaged": ["c.tar"]})
    assert read_tar(tmp_path / "out" / "c.tar") == {}


def test_folder_and_parquet(tmp_path, vqgan):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(picture(number, format="PNG"))
    lines = [{"file_name": f"{number}.png", "text": f"t{number}", "clip_score": 0.25} for number in range(7)]
    jsonl(folder / "metadata.jsonl", lines)
    rows = {"image": [picture(n, format="PNG") for n in range(6)], "caption": [f"t{n}" for n in range(6)]}
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    report = run([folder, tmp_path / "p.parquet"], tmp_path / "out", vqgan, max_bad_fraction=0.5)
    assert [shard.name for shard in report.manifest.shards] == ["p.tar", "photos-00000.tar", "photos-00001.tar"]
    assert dict(report.skipped) == {"no_image": 1}
    of_folder = read_tar(tmp_path / "out" / "photos-00000.tar") | read_tar(tmp_path / "out" / "photos-00001.tar")
    of_parquet = read_tar(tmp_path / "out" / "p.tar")
    assert [m["npy"] for m in of_folder.values()] == [m["npy"] for m in of_parquet.values()]
    assert [m["txt"] for m in of_folder.values()] == [m["txt"] for m in of_parquet.values()]
    assert json.loads(of_folder["0"]["json"])["clip_score"] == 0.25


def test_captions_normalised_and_tokenised_for_the_shards(tars, tmp_path, vqgan):
    text = TextEncoder(tiny_processor())
    report = run(tars, tmp_path / "out", vqgan, text)
    assert report.manifest.settings.text == text.fingerprint
    for members in read_tar(tmp_path / "out" / "0.tar").values():
        caption = members["txt"].decode()
        assert json.loads(members["json"])["normalized"] == caption
        assert codes_of(members["tokens.npy"]).tolist() == text([caption])[0].tolist()


def test_a_second_run_keeps_what_is_there(tars, tmp_path, vqgan, monkeypatch):
    run(tars, tmp_path / "out", vqgan)
    before = {
        name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out") if name.endswith("tar")
    }
    (tmp_path / "out" / "1.tar").write_bytes(b"half of it")
    report = run(tars, tmp_path / "out", vqgan)
    assert (report.kept, report.shards, report.samples) == (2, 1, 3)
    assert report.manifest.samples == 12
    after = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before}
    assert {name for name in before if before[name] != after[name]} == {"1.tar"}


class Interrupting:
    """Raises at the n-th batch."""

    def __init__(self, monkeypatch, error, after):
        codes = encode_module._codes
        self.left = after

        def interrupted(*args):
            if self.left == 0:
                raise error
            self.left -= 1
            return codes(*args)

        monkeypatch.setattr(encode_module, "_codes", interrupted)


@pytest.mark.parametrize("after", range(4))
def test_after_an_interruption_anywhere_the_rest_is_done(after, tars, tmp_path, vqgan):
    run(tars, tmp_path / "whole", vqgan)
    with pytest.MonkeyPatch.context() as patch:
        Interrupting(patch, KeyboardInterrupt(), after)
        with pytest.raises(KeyboardInterrupt):
            run(tars, tmp_path / "out", vqgan)
    committed = [name for name in files(tmp_path / "out") if name.endswith(".tar")]
    assert committed == ["0.tar", "1.tar"][: {0: 0, 1: 0, 2: 1, 3: 2}[after]]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not manifest["complete"] and [shard["name"] for shard in manifest["shards"]] == committed
    assert run(tars, tmp_path / "out", vqgan).kept == len(committed)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read", "decode", "write"))]


def test_what_a_killed_writer_left_is_removed(tars, tmp_path, vqgan):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".tmp-0123abcd-0.tar").write_bytes(b"half")
    run(tars, tmp_path / "out", vqgan)
    assert not [name for name in files(tmp_path / "out") if ".tmp" in name]


def test_what_another_host_writes_is_not_removed(tars, tmp_path, vqgan):
    (tmp_path / "out").mkdir()
    for name in (".tmp-0123abcd-train-0.tar", ".tmp-0123abcd-0123abcd-0.tar"):
        (tmp_path / "out" / name).write_bytes(b"at work")
    good_tar(tmp_path / "in" / "[0].tar", 1)
    (tmp_path / "out" / ".tmp-0123abcd-[0].tar").write_bytes(b"half")
    run([tmp_path / "in"], tmp_path / "out", vqgan)
    left = [name for name in files(tmp_path / "out") if ".tmp" in name]
    assert left == [".tmp-0123abcd-0123abcd-0.tar", ".tmp-0123abcd-train-0.tar"]


def test_a_killed_run_has_a_manifest_of_its_shards(tars, tmp_path, vqgan, monkeypatch):
    monkeypatch.setattr(encode_module, "MANIFEST_SECONDS", 0.0)
    monkeypatch.setattr(encode_module.time, "monotonic", lambda: 0.0)
    write, seen = ShardFolder.write_manifest, []
    monkeypatch.setattr(
        ShardFolder, "write_manifest", lambda *args: seen.append(len((made := write(*args)).shards)) or made
    )
    run(tars, tmp_path / "out", vqgan)
    assert seen == [1, 2, 3, 3]


def test_a_run_without_a_single_sample_is_an_error(tmp_path, vqgan):
    write_tar(tmp_path / "in" / "0.tar", [])
    with pytest.raises(
        ValueError, match=r"without a single sample \(parts of the input: 1, first in/0.tar; skipped: nothing"
    ):
        run([tmp_path / "in"], tmp_path / "out", vqgan)
    write_tar(tmp_path / "in" / "1.tar", [(str(n), {"txt": b"x"}) for n in range(4)])
    with pytest.raises(ValueError, match="skipped: no_image: 4"):
        run([tmp_path / "in"], tmp_path / "out", vqgan, max_bad_fraction=1)
    good_tar(tmp_path / "in" / "0.tar", 30)
    assert run([tmp_path / "in"], tmp_path / "out", vqgan, max_bad_fraction=1).manifest.samples == 30
    run([tmp_path / "in"], tmp_path / "two", vqgan, max_bad_fraction=1, host_index=1, host_count=2)


def test_hosts_share_a_folder_and_write_no_shard_twice(tars, tmp_path, vqgan):
    run(tars, tmp_path / "whole", vqgan)
    reports = [run(tars, tmp_path / "out", vqgan, host_index=index, host_count=2) for index in (1, 0)]
    assert [report.shards for report in reports] == [1, 2]
    assert [report.manifest.complete for report in reports] == [False, True]
    assert [report.manifest.samples for report in reports] == [3, 12]
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    idle = run(tars, tmp_path / "out", vqgan, host_index=3, host_count=4)
    assert (idle.shards, idle.kept) == (0, 0)


class ObjectStore(MemoryFileSystem):
    """Has no folders but those that files lie in."""

    protocol = "objects"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("objects://", "memory://"))

    def makedirs(self, path, exist_ok=False):
        pass

    mkdir = makedirs


@pytest.mark.parametrize("kind", ["memory", "objects"])
def test_behind_a_url(kind, tars, tmp_path, vqgan):
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    root = f"{kind}://{tmp_path.name}/out"
    parts = find_parts([str(path) for path in tars], None, "image", 4)
    options = EncodeOptions(batch_size=3, threads=2)
    report = encode(parts, ShardFolder(root), vqgan, None, options)
    assert report.manifest.samples == 12
    run(tars, tmp_path / "local", vqgan)
    system = fsspec.filesystem(kind)
    for name in files(tmp_path / "local"):
        assert system.cat_file(f"/{tmp_path.name}/out/{name}") == (tmp_path / "local" / name).read_bytes()
    assert encode(parts, ShardFolder(root), vqgan, None, options).kept == 3
    again = find_parts([root + "/{0..2}.tar"], None, "image", 4)
    assert [part.weight for part in again] == [shard.bytes for shard in report.manifest.shards]


def test_a_folder_takes_no_shards_made_otherwise(tars, tmp_path, vqgan):
    run(tars[:2], tmp_path / "out", vqgan)
    before = files(tmp_path / "out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other, larger = tiny_vqgan(), tiny_vqgan(resolution=32)
    for network, text, key, message in [
        (other, None, None, "made with other settings: here vqgan"),
        (larger, None, None, "resolution 32, not 16; image_length 64, not 16"),
        (vqgan, TextEncoder(tiny_processor()), None, "text .*, not none"),
        (vqgan, None, "caption", "caption_key caption, not none"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tars, tmp_path / "out", network, text, key)
    moved = good_tar(tmp_path / "else" / "photos.tar", 2)
    jsonl(tmp_path / "p" / "metadata.jsonl", [{"file_name": "a.jpg", "text": "x"}] * 9)
    assert moved.is_file() and files(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["in", "in/../in/", "link", "file://{}/in"])
def test_the_input_is_not_replaced(name, tars, tmp_path, vqgan):
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = tars[0].read_bytes()
    output = name.format(tmp_path) if "{}" in name else f"{tmp_path}/{name}"
    with pytest.raises(ValueError, match="holds the input, which the shards would replace"):
        run(tars, output, vqgan)
    assert files(tmp_path / "in") == ["0.tar", "1.tar", "2.tar"] and tars[0].read_bytes() == before


def test_other_input_of_the_same_names_is_refused(tmp_path, vqgan):
    for number in range(8):
        path = tmp_path / "p" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number, format="PNG"))
    jsonl(tmp_path / "p" / "metadata.jsonl", [{"file_name": f"{n}.png", "text": "x"} for n in range(8)])
    run([tmp_path / "p"], tmp_path / "out", vqgan)
    parts = find_parts([str(tmp_path / "p")], None, "image", 6)
    with pytest.raises(
        ValueError, match=r"other input: p-00000.tar comes from .*/p/metadata.jsonl:0\+4 .* not from .*:0\+6"
    ):
        encode(parts, ShardFolder(str(tmp_path / "out")), vqgan, None, EncodeOptions())


def test_other_files_of_the_same_names_are_refused(tmp_path, vqgan):
    for index, folder in enumerate("ab"):
        good_tar(tmp_path / folder / "0.tar", 2, 10 * index)
    run([tmp_path / "a"], tmp_path / "out", vqgan)
    size = f"{(tmp_path / 'a' / '0.tar').stat().st_size:,}"
    with pytest.raises(ValueError) as caught:
        run([tmp_path / "b"], tmp_path / "out", vqgan)
    assert f"0.tar comes from a/0.tar ({size} bytes) and not from b/0.tar ({size} bytes). Use an" in str(caught.value)
    assert str(caught.value).endswith("or remove 0.tar to have it made again")
    good_tar(tmp_path / "a" / "0.tar", 30)
    with pytest.raises(ValueError, match=r"comes from a/0.tar \(10,240 bytes\) and not from a/0.tar \(.* bytes\)"):
        run([tmp_path / "a"], tmp_path / "out", vqgan)
    (tmp_path / "out" / "0.tar").unlink()
    assert run([tmp_path / "a"], tmp_path / "out", vqgan).manifest.samples == 30


def test_a_damaged_file_that_was_repaired_is_encoded_again(tars, tmp_path, vqgan):
    whole = tars[0].read_bytes()
    tars[0].write_bytes(whole[: whole.index(b"picture 3")])
    assert run(tars, tmp_path / "out", vqgan, max_bad_fraction=0.5).manifest.skipped == {"shard_damaged": 1}
    tars[0].write_bytes(whole)
    report = run(tars, tmp_path / "out", vqgan)
    assert (report.kept, report.shards, report.manifest.samples, report.manifest.skipped) == (2, 1, 12, {})


def test_a_folder_that_is_added_leaves_the_names_of_the_first(tmp_path, vqgan):
    for index, folder in enumerate("ab"):
        for name in "01":
            good_tar(tmp_path / folder / f"{name}.tar", 2 + int(name), 10 * index)
    run([tmp_path / "a"], tmp_path / "out", vqgan)
    report = run([tmp_path / "a", tmp_path / "b"], tmp_path / "out", vqgan)
    assert [shard.name for shard in report.manifest.shards] == ["0.tar", "1.tar", "b-0.tar", "b-1.tar"]
    assert (report.kept, report.shards, report.manifest.samples, report.manifest.complete) == (2, 2, 10, True)
    for inputs in (["a"], ["b"], ["b", "a"]):
        again = run([tmp_path / name for name in inputs], tmp_path / "out", vqgan)
        assert (again.kept, again.shards, again.manifest.samples) == (2 * len(inputs), 0, 10)


def test_two_inputs_that_nothing_tells_apart_are_refused(tmp_path, vqgan):
    for folder in "pq":
        good_tar(tmp_path / folder / "x" / "0.tar", 2)
    run([tmp_path / "p" / "x"], tmp_path / "out", vqgan)
    both = [tmp_path / folder / "x" for folder in "pq"]
    with pytest.raises(ValueError, match="0.tar was made from x/0.tar, which 2 of the inputs are called. Use another"):
        run(both, tmp_path / "out", vqgan)
    assert run(both, tmp_path / "both", vqgan).manifest.samples == 4
    assert run(both, tmp_path / "both", vqgan).kept == 2


def test_without_the_manifest_records_tell_the_settings(tars, tmp_path, vqgan):
    run(tars, tmp_path / "out", vqgan)
    (tmp_path / "out" / "manifest.json").unlink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = tiny_vqgan()
    with pytest.raises(ValueError, match=r"made with other settings: the record of 0.tar \(one of 3\) names settings"):
        run(tars, tmp_path / "out", other)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(tars, tmp_path / "out", vqgan).manifest.complete


def test_settings_without_shards_bind_nobody(tmp_path, vqgan):
    good = [(str(n), captioned(n, json=b'{"alt": "y"}')) for n in range(3)]
    write_tar(tmp_path / "in" / "0.tar", good)
    with pytest.raises(ValueError, match=r"3 of 3 samples \(100.0%\) cannot be used \(no_caption: 3\)"):
        run([tmp_path / "in"], tmp_path / "out", vqgan, caption_key="title")
    assert (tmp_path / "out" / "manifest.json").exists()
    assert run([tmp_path / "in"], tmp_path / "out", vqgan, caption_key="alt").manifest.settings.caption_key == "alt"


def test_too_many_bad_samples_end_the_run_before_the_shard_is_committed(tmp_path, vqgan, monkeypatch):
    good_tar(tmp_path / "in" / "0.tar", 4)
    write_tar(tmp_path / "in" / "1.tar", [(str(n), captioned(n, jpg=b"junk")) for n in range(4)])
    with pytest.raises(
        ValueError, match=r"4 of 8 samples \(50.0%\) cannot be used \(image_damaged: 4\), more than max_bad_fr"
    ):
        run([tmp_path / "in"], tmp_path / "out", vqgan, max_bad_fraction=0.4)
    assert [name for name in files(tmp_path / "out") if name.endswith(".tar")] == ["0.tar"]
    odd = [(name, captioned(0, jpg=b"junk")) for name in ("x\ny", "k" * 70, "ä", "d", "e", "f")]
    write_tar(tmp_path / "odd" / "1.tar", odd)
    with pytest.raises(ValueError) as caught:
        run([tmp_path / "odd"], tmp_path / "other", vqgan)
    names = ", ".join(f"{name} (image_damaged)" for name in ("x\\ny", "k" * 57 + "...", "\\xe4", "d", "e"))
    assert f"allows; in odd/1.tar: {names}, .... Shards" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(encode_module, "BAD_SAMPLES_GRACE", 4)
    good_tar(tmp_path / "in" / "2.tar", 40)
    with pytest.raises(ValueError, match="4 of 8 samples"):
        run([tmp_path / "in"], tmp_path / "out", vqgan, max_bad_fraction=0.4)
    assert run([tmp_path / "in"], tmp_path / "out", vqgan, max_bad_fraction=0.5).manifest.samples == 44


@pytest.mark.parametrize("where", ["member", "flush"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(where, tars, tmp_path, vqgan, monkeypatch):
    from webdataset.writer import TarWriter

    full = OSError(errno.ENOSPC, "No space left on device")
    run(tars[:1], tmp_path / "out", vqgan)

    def fail(*args):
        raise full

    if where == "member":
        monkeypatch.setattr(TarWriter, "write", fail)
    else:
        monkeypatch.setattr(atomic, "_flush", fail)
    with pytest.raises(OSError, match=f"cannot write to {tmp_path}/out: No space left on device"):
        run(tars, tmp_path / "out", vqgan)
    assert [name for name in files(tmp_path / "out") if "tar" in name] == ["0.tar", "records/0.tar.json"]


def test_progress_without_a_terminal_is_a_line_now_and_then(tars, tmp_path, vqgan, monkeypatch, caplog):
    monkeypatch.setattr(encode_progress, "REPORT_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="dalle_torch"):
        run(tars, tmp_path / "out", vqgan)
    lines = [record.message for record in caplog.records]
    assert re.fullmatch(r"0 of 3 shards, 3 images, \d+\.\d images/s, about \d+ s left", lines[0])
    assert lines[-1].startswith("2 of 3 shards, 12 images, ")


def test_progress_on_a_terminal_is_a_bar(tars, tmp_path, vqgan, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(tars, tmp_path / "out", vqgan)
    shown = capsys.readouterr().err
    assert re.search(r"encoding +0%\|.*\| 00:00 so far, \? left", shown)
    assert re.search(r"encoding +\d+%\|.* left, 2 of 3 shards, 12 images, \d+\.\d images/s", shown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0, "threads": -1}, "batch_size=0 must be at least 1; threads=-1 must be at least 1"),
        ({"max_pixels": 1 << 40}, "max_pixels=1099511627776 must be at most"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction=1.5 must lie in [0, 1]"),
        ({"host_index": 2, "host_count": 2}, "host_index=2 must lie in [0, 2)"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError) as caught:
        EncodeOptions(**options)
    assert message in str(caught.value)


def test_only_what_decides_the_codes_counts_as_another_network(vqgan):
    before = fingerprint(vqgan)
    with torch.no_grad():
        vqgan.decoder.conv_out.bias += 1
        assert fingerprint(vqgan) == before
        vqgan.decoder.conv_out.bias -= 1
        vqgan.encoder.conv_in.bias += 1
        assert fingerprint(vqgan) != before
        vqgan.encoder.conv_in.bias -= 1
