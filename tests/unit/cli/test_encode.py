"""`dalle-torch encode` as it is typed: what it prints, what it leaves, one line for everything that can go wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from dalle_torch.cli.main import main
from tests.shard_files import captioned, good_tar, read_tar, write_tar
from tests.tiny_pipeline import save_tiny
from tests.unit.data.test_shards import Bucket


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tars(tmp_path):
    for index in range(3):
        good_tar(tmp_path / "in" / f"{index}.tar", 4, 10 * index)
    return tmp_path / "in"


def arguments(model, inputs, output, *options):
    return ["encode", str(inputs), "--output", str(output), "--vqgan", str(model / "vqgan"), "--device", "cpu",
            "--batch-size", "4", "--threads", "1", *options]  # fmt: skip


def fails(capsys, *argv):
    """The one line that a failing command prints."""
    assert main(list(argv)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("dalle-torch: error: ").rstrip("\n")


def test_shards_manifest_and_a_summary(model, tars, tmp_path, capsys, caplog):
    write_tar(tars / "3.tar", [("a", captioned(1)), ("b", captioned(2, jpg=b"junk"))])
    argv = arguments(model, tars, tmp_path / "out", "--tokenizer", str(model))
    assert main(argv) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("13 pictures in 4 shards in ") and lines[0].endswith("of the time in the VQGAN")
    assert "images/s" in lines[0]
    summary = f"{tmp_path}/out: 13 samples in 4 shards, complete\nskipped 1: image_damaged\n"
    assert captured.out.endswith(f"\n{summary}") and len(lines) == 3
    assert captured.err == ""
    assert set(read_tar(tmp_path / "out" / "0.tar")["00000"]) == {"txt", "npy", "json", "tokens.npy"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 13
    assert main(argv) == 0
    assert capsys.readouterr().out == summary
    assert "4 of 4 shards are there already" in caplog.text


def test_two_hosts(model, tars, tmp_path, capsys):
    for index in range(2):
        argv = arguments(model, tars, tmp_path / "out", "--host-index", str(index), "--host-count", "2")
        assert main(argv) == 0
    out = capsys.readouterr().out
    assert "not complete yet: other hosts are at work, or still to come" in out
    assert out.endswith(f"{tmp_path}/out: 12 samples in 3 shards, complete\n")


def test_what_is_missing(model, tars, tmp_path, capsys):
    out = tmp_path / "out"
    assert fails(capsys, *arguments(model, tmp_path / "*.zip", out)) == f"no shard matches {tmp_path}/*.zip"
    line = fails(capsys, *arguments(model, f"{tars}/{{0..5}}.tar", out))
    assert line.startswith(f"{tars}/{{0..5}}.tar stands for 6 shards, of which 3 are not: {tars}/3.tar, ")
    line = fails(capsys, *arguments(tmp_path / "nothing", tars, out))
    assert line.startswith(f"{tmp_path}/nothing/vqgan is not a folder here")
    assert "nosuch://x cannot be opened: Protocol not known: nosuch" in fails(
        capsys, *arguments(model, "nosuch://x", out)
    )
    line = fails(capsys, *arguments(model, tars, out, "--tokenizer", str(tmp_path / "nothing")))
    assert line.startswith(f"{tmp_path}/nothing is not a folder here")
    assert not out.exists()


def test_a_bucket_that_cannot_be_read_or_written(model, tars, tmp_path, capsys, monkeypatch):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "failure", PermissionError("Forbidden"))
    line = fails(capsys, *arguments(model, "bucket://b/*.tar", tmp_path / "out"))
    assert line == "bucket://b/*.tar may not be read: Forbidden"
    line = fails(capsys, *arguments(model, tars, "bucket://b/out"))
    assert line == "bucket://b/out/.dalle_torch_write_test may not be written: Forbidden"


def test_a_caption_key_that_does_not_exist(model, tars, tmp_path, capsys):
    json_tar = [(str(n), captioned(n, json=b'{"caption": "x", "alt": "y"}')) for n in range(3)]
    write_tar(tmp_path / "json" / "0.tar", json_tar)
    line = fails(capsys, *arguments(model, tmp_path / "json", tmp_path / "out", "--caption-key", "title"))
    assert line == f"{tmp_path}/json/0.tar: no sample has the caption key title; the keys it has: caption, alt"
    assert not (tmp_path / "out").exists()
    assert main(arguments(model, tmp_path / "json", tmp_path / "out", "--caption-key", "alt")) == 0
    assert read_tar(tmp_path / "out" / "0.tar")["0"]["txt"] == b"y"


def test_a_folder_made_otherwise(model, tars, tmp_path, capsys):
    assert main(arguments(model, tars, tmp_path / "out")) == 0
    capsys.readouterr()
    line = fails(capsys, *arguments(model, tars, tmp_path / "out", "--tokenizer", str(model)))
    assert line.startswith(f"{tmp_path}/out was made with other settings: here text ")
    assert line.endswith("not none as there. Use another folder")
    argv = arguments(model, tars, tmp_path / "out")
    argv[argv.index("--vqgan") + 1] = "shapes"
    assert "made with other settings: here vqgan " in fails(capsys, *argv)


def test_other_files_of_the_same_names(model, tars, tmp_path, capsys):
    good_tar(tmp_path / "b" / "0.tar", 4)
    assert main(arguments(model, tars / "0.tar", tmp_path / "out")) == 0
    capsys.readouterr()
    line = fails(capsys, *arguments(model, tmp_path / "b" / "0.tar", tmp_path / "out"))
    assert line.startswith(f"{tmp_path}/out was made from other input: 0.tar comes from in/0.tar (")
    argv = arguments(model, tmp_path / "b" / "0.tar", tmp_path / "out")
    assert main([argv[0], str(tars / "0.tar"), *argv[1:]]) == 0
    assert capsys.readouterr().out.endswith("8 samples in 2 shards, complete\n")


@pytest.mark.parametrize("name", ["out[1]", "a*b", "{c,d}"])
def test_an_output_whose_name_looks_like_a_pattern(name, model, tars, tmp_path, capsys):
    output = tmp_path / name
    assert main(arguments(model, tars, output)) == 0
    assert capsys.readouterr().out.endswith(f"{output}: 12 samples in 3 shards, complete\n")
    assert main(arguments(model, tars, output)) == 0
    assert main(["encode", "--output", str(output), "--verify"]) == 0


def test_verify(model, tars, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(model, tars, out)) == 0
    capsys.readouterr()
    assert main(["encode", "--output", str(out), "--verify"]) == 0
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    line = f"{out}: 3 shards ({size:,} bytes) are what the manifest says; it is complete, with 12 samples\n"
    assert capsys.readouterr().out == line
    data = bytearray((out / "1.tar").read_bytes())
    data[600] ^= 1
    (out / "1.tar").write_bytes(data)
    line = fails(capsys, "encode", "--output", str(out), "--verify")
    assert line.startswith(f"{out}: 1 of 3 shards are not what the manifest says: 1.tar has sha256 ")
    (out / "1.tar").unlink()
    assert main(arguments(model, tars, out)) == 0, "as the line says"
    assert main(["encode", "--output", str(out), "--verify"]) == 0
    capsys.readouterr()
    assert "leave out in.tar" in fails(capsys, "encode", "in.tar", "--output", str(out), "--verify")
    assert "no INPUT is named" in fails(capsys, "encode", "--output", str(out))
    assert f"{tmp_path} has no manifest.json" in fails(capsys, "encode", "--output", str(tmp_path), "--verify")


def test_input_without_a_sample(model, tmp_path, capsys):
    write_tar(tmp_path / "in" / "0.tar", [])
    line = fails(capsys, *arguments(model, tmp_path / "in", tmp_path / "out"))
    assert line.startswith(f"{tmp_path}/out is complete without a single sample")


def test_too_many_bad_samples(model, tars, tmp_path, capsys):
    write_tar(tars / "3.tar", [(str(n), captioned(n, jpg=b"junk")) for n in range(4)])
    line = fails(capsys, *arguments(model, tars, tmp_path / "out", "--max-bad-fraction", "0.2"))
    assert line.startswith(
        "4 of 16 samples (25.0%) cannot be used (image_damaged: 4), more than max_bad_fraction=0.2 allows"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples-per-shard", "0"], "--samples-per-shard 0 must be at least 1"),
        (["--batch-size", "0"], "encode cannot start: batch_size=0 must be at least 1"),
        (["--host-index", "3"], "encode cannot start: host_index=3 must lie in [0, 1)"),
        (["--device", "tpu"], "device='tpu' is not one of auto, cpu"),
    ],
)
def test_options_out_of_range(options, message, model, tars, tmp_path, capsys):
    assert message in fails(capsys, *arguments(model, tars, tmp_path / "out", *options))


def test_an_output_that_takes_no_file(model, tars, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    line = fails(capsys, *arguments(model, tars, tmp_path / "file" / "out"))
    assert line == f"cannot write to {tmp_path}/file/out: Not a directory"


def test_ctrl_c_keeps_what_is_committed_and_the_rest_is_done_again(model, tmp_path):
    for index in range(3):
        good_tar(tmp_path / "in" / f"{index}.tar", 4, 10 * index)
    # Long enough that the signal finds it at work, however busy the machine is.
    sample = captioned(0)
    write_tar(tmp_path / "in" / "3.tar", ((f"{number:04d}", sample) for number in range(3000)))
    argv = [sys.executable, "-m", "dalle_torch.cli.main", *arguments(model, tmp_path / "in", tmp_path / "out")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    while process.poll() is None and not (tmp_path / "out" / "records" / "2.tar.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "dalle-torch: interrupted\n")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0.tar", "1.tar", "2.tar", "manifest.json", "records"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["complete"]) == (12, False)
    before = [(tmp_path / "out" / name).stat().st_mtime_ns for name in names[:3]]
    assert main(argv[3:]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["complete"]) == (3012, True)
    assert [(tmp_path / "out" / name).stat().st_mtime_ns for name in names[:3]] == before
