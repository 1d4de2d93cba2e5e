"""`dalle-torch convert`: real checkpoints in, a clean folder out, or nothing at all."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle_torch import DallePipeline
from dalle_torch.cli import convert
from dalle_torch.cli.main import main
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from tests.helpers import GOLDENS
from tests.hub_server import HubServer
from tests.tiny_pipeline import save_tiny

GOLDEN = GOLDENS / "dallebart" / "normformer-glu-scan"
MIN_DALLE_CONFIG = {
    "model_type": "dallebart", "encoder_vocab_size": 50, "image_vocab_size": 40, "max_text_length": 64,
    "image_length": 256, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "use_glu": True,
}  # fmt: skip


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_a_table_and_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, dest = tmp_path / "source", tmp_path / "new" / "dest"
    shutil.copytree(GOLDEN, source)
    kept = {"tokenizer.json": "{}", "merges.txt": "#version", "README.md": "a card", "LICENSE": "a licence"}
    for name, content in {**kept, "train.py": "print()", "opt_state.msgpack": "x"}.items():
        (source / name).write_text(content)
    assert main(["convert", str(source), str(dest)]) == 0
    assert files(dest) == {"config.json", "model.safetensors", *kept}
    assert all((dest / name).read_text() == content for name, content in kept.items())
    original, found = DalleBart.from_pretrained(GOLDEN).state_dict(), DalleBart.from_pretrained(dest).state_dict()
    assert original.keys() == found.keys()
    assert all(torch.equal(original[name], tensor) for name, tensor in found.items())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[: len(found)]] == [
        [name, "x".join(str(size) for size in tensor.shape), "float32"] for name, tensor in found.items()
    ]
    numbers = sum(tensor.numel() for tensor in found.values())
    assert f"{len(found)} tensors, {numbers:,} parameters, {4 * numbers:,} bytes" in lines
    for name in files(dest):
        assert f"{hashlib.sha256((dest / name).read_bytes()).hexdigest()}  {name}" in lines
    assert lines[-1] == f"{dest}: written, reloaded, and every tensor equal"
    config = json.loads((dest / "config.json").read_text())
    assert config["architectures"] == ["DalleBart"]
    assert str(tmp_path) not in (dest / "config.json").read_text()


def test_dtype_and_shards(tmp_path: Path) -> None:
    assert main(["convert", str(GOLDEN), str(tmp_path / "d"), "--dtype", "bfloat16", "--max-shard-size", "50KB"]) == 0
    shards = sorted((tmp_path / "d").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert DalleBart.from_pretrained(tmp_path / "d").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "model_class"),
    [
        ("vqgan/flax", [], VQGAN),
        ("vqgan/taming-vq", ["--trust-pickle"], VQGAN),
        ("vqgan/taming-gumbel", ["--trust-pickle", "--model-type", "vqgan"], VQGAN),
        ("dallebart/swinv2", ["--model-type", "dallebart"], DalleBart),
    ],
)
def test_the_type_of_model_is_found(tmp_path: Path, name: str, options: list[str], model_class: type) -> None:
    assert main(["convert", str(GOLDENS / name), str(tmp_path / "dest"), *options]) == 0
    expected = model_class.from_pretrained(GOLDENS / name, trust_pickle=True).state_dict()
    found = model_class.from_pretrained(tmp_path / "dest").state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("place", ["folder", "hub", "hub, inside"])
def test_what_draws_with_the_source_draws_the_same_with_the_copy(hub: HubServer, tmp_path: Path, place: str) -> None:
    tree = tmp_path / "tree"
    source = save_tiny(tree / "inner" if place == "hub, inside" else tree)
    (source / "vqgan" / "LICENSE").write_text("a licence")
    hub.add_repo("org/tiny", tree)
    name = str(source) if place == "folder" else "org/tiny"
    inside = ["--subfolder", "inner"] if place == "hub, inside" else []
    dest = tmp_path / "dest"
    assert main(["convert", name, str(dest), "--dtype", "bfloat16", *inside]) == 0
    assert files(dest) == files(source)
    assert files(dest / "vqgan") == {"config.json", "model.safetensors", "LICENSE"}
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (dest / file).read_bytes() == (source / file).read_bytes()
    assert str(tree) not in (dest / "vqgan" / "config.json").read_text()
    original, found = (VQGAN.from_pretrained(folder / "vqgan").state_dict() for folder in (source, dest))
    assert original.keys() == found.keys()
    assert all(torch.equal(original[key], tensor) for key, tensor in found.items())  # pictures are decoded in float32
    pictures = [
        DallePipeline.from_pretrained(str(folder), dtype="bfloat16")("a red square", seed=3).images[0].tobytes()
        for folder in (source, dest)
    ]
    assert pictures[0] == pictures[1]


def test_the_vqgan_is_checked_as_the_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source")
    with monkeypatch.context() as patch:

        def save_with_a_flaw(self: VQGAN, folder: Path, **options: object) -> None:
            with torch.no_grad():
                self.codebook[0, 0] += 1
            save(self, folder, **options)

        save = VQGAN.save_pretrained
        patch.setattr(VQGAN, "save_pretrained", save_with_a_flaw)
        message = failure(capsys, source, tmp_path / "dest")
        assert "1 tensors differ after reloading, nothing is kept: quantize.embedding.weight" in message
    (source / "vqgan" / "model.safetensors").unlink()
    assert "no weights that VQGAN can read" in failure(capsys, source, tmp_path / "dest")
    assert files(tmp_path) == {"source"}


def test_min_dalle_with_a_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, GOLDENS / "min-dalle", tmp_path / "dest", "--trust-pickle")
    assert "pass config=DalleBartConfig(...), or write a folder" in message
    assert "by dalle-torch convert SOURCE DEST --config FILE" in message
    (tmp_path / "c.json").write_text(json.dumps(MIN_DALLE_CONFIG))
    command = ["convert", str(GOLDENS / "min-dalle"), str(tmp_path / "dest"), "--config", str(tmp_path / "c.json")]
    assert main(command) == 1
    assert main([*command, "--trust-pickle"]) == 0
    assert DalleBart.from_pretrained(tmp_path / "dest").config.encoder_attention_heads == 4


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a failing command leaves."""
    capsys.readouterr()
    assert main(["convert", *map(str, words)]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("dalle-torch: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_what_is_there_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "mine").write_text("work of years")
    assert "is not empty: give another folder, or --overwrite" in failure(capsys, GOLDEN, dest)
    assert files(dest) == {"mine"}
    assert main(["convert", str(GOLDEN), str(dest), "--overwrite"]) == 0
    assert files(dest) == {"config.json", "model.safetensors"}
    assert "is a file: name a folder" in failure(capsys, GOLDEN, dest / "config.json", "--overwrite")
    shutil.copytree(GOLDENS / "vqgan" / "flax", dest / "vqgan")
    for place in (dest, dest / "vqgan", tmp_path):
        assert "holds SOURCE" in failure(capsys, dest, place, "--overwrite")
    assert files(dest) == {"config.json", "model.safetensors", "vqgan"}


def test_a_failed_check_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_with_a_flaw(self: DalleBart, folder: Path, **options: object) -> None:
        with torch.no_grad():
            self.lm_head.weight[0, 0] += 1
        save(self, folder, **options)

    save = DalleBart.save_pretrained
    monkeypatch.setattr(DalleBart, "save_pretrained", save_with_a_flaw)
    message = failure(capsys, GOLDEN, tmp_path / "dest")
    assert "1 tensors differ after reloading, nothing is kept: lm_head.weight" in message
    assert files(tmp_path) == set()


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_verify", interrupt)
    assert main(["convert", str(GOLDEN), str(tmp_path / "dest")]) == 130
    assert files(tmp_path) == set()


def test_bad_input_is_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "dest"
    assert "nowhere" in failure(capsys, tmp_path / "nowhere", dest)
    assert "which are pickles" in failure(capsys, GOLDENS / "vqgan" / "taming-vq", dest)
    assert "--config nofile: there is no such file" in failure(capsys, GOLDEN, dest, "--config", "nofile")
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "odd.json").write_text('{"model_type": "dallebart", "image_length": "x"}')
    message = failure(capsys, GOLDEN, dest, "--config", tmp_path / "odd.json")
    assert f"--config {tmp_path / 'odd.json'}: its configuration cannot be used: " in message
    assert "image_length" in message
    assert "is no JSON object of options" in failure(capsys, GOLDEN, dest, "--config", tmp_path / "bad.json")
    for size in ("50XB", "foo", "GB", "0MB", "-1GB", "nanGB"):
        message = failure(capsys, tmp_path / "nowhere", dest, f"--max-shard-size={size}")
        assert f"--max-shard-size {size} is no size: give a number and its unit" in message
    assert "holds a model of type 'dallebart', but VQGAN" in failure(capsys, GOLDEN, dest, "--model-type", "vqgan")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither a config.json nor weights of a known format" in failure(capsys, empty, dest)
    (empty / "config.json").write_text('{"model_type": "bart"}')
    assert "type 'bart', not one of dallebart, vqgan" in failure(capsys, empty, dest)
    cut = tmp_path / "cut"
    shutil.copytree(GOLDEN, cut)
    (cut / "flax_model.msgpack").write_bytes((GOLDEN / "flax_model.msgpack").read_bytes()[:100_000])
    assert "is it truncated?" in failure(capsys, cut, dest)
    assert not dest.exists()
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(GOLDEN), str(dest), "--dtype", "int8"])
    assert exit_.value.code == 2


def test_from_the_hub_and_back_to_it(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "t")
    hub.add_repo("org/scanned", GOLDEN, revision="v1")
    command = ["convert", "org/scanned", str(tmp_path / "dest"), "--revision", "v1"]
    assert main([*command, "--push-to-hub", "tester/clean"]) == 0
    assert "uploaded to " in capsys.readouterr().out
    expected = DalleBart.from_pretrained(GOLDEN).state_dict()
    found = DalleBart.from_pretrained("tester/clean").state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    hub.refuse(403, path="/api/repos/create")
    message = failure(capsys, *command[1:], "--overwrite", "--push-to-hub", "org/other")
    assert f"{tmp_path / 'dest'} is written, but not uploaded to org/other: " in message
    assert files(tmp_path / "dest") == {"config.json", "model.safetensors"}


def test_without_a_network_the_folder_is_written_and_said_to_be(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "t")
    hub.stop()
    dest = tmp_path / "dest"
    message = failure(capsys, GOLDEN, dest, "--push-to-hub", "me/x")
    assert f"{dest} is written, but not uploaded to me/x: " in message
    assert f"hf upload me/x {dest}" in message
    assert "--debug" not in message
    assert files(dest) == {"config.json", "model.safetensors"}


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    # No such source: had it been looked for, the message would be about it.
    for dest in ("/proc/dest", tmp_path / "file" / "dest"):
        message = failure(capsys, "/no/source", dest)
        assert f"cannot write to DEST {dest}: " in message
        assert ".tmp-" not in message
    assert files(tmp_path) == {"file"}


def test_folders_made_for_a_conversion_that_fails_go_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert "source" in failure(capsys, "/no/source", tmp_path / "mine" / "new" / "newer" / "dest")
    assert files(tmp_path) == {"mine"}
    assert files(tmp_path / "mine") == set()


def test_a_limit_on_the_size_of_files_is_one_line_and_an_end(tmp_path: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20480, 20480));"
        "from dalle_torch.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-B", "-c", code, "convert", str(GOLDEN), str(tmp_path / "dest")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("dalle-torch: error: ")
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert "--debug" not in done.stderr
    assert files(tmp_path) == set()
