"""Every mistake a user can make is one line, a status that is not zero, no traceback, and no file."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dalle_torch.cli.main import main
from tests.helpers import GOLDENS
from tests.tiny_pipeline import CODEBOOK, save_tiny, tiny_vqgan

MSGPACK = GOLDENS / "dallebart" / "normformer-glu"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command line that has to fail, and gives back its one line."""

    def run(*arguments, command="generate"):
        output = tmp_path / "out"
        assert main([command, "--output", str(output), "--device", "cpu", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("dalle-torch: error: ")
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        assert "--debug shows where" not in captured.err, "the message was written for the user"
        assert not output.exists()
        return captured.err

    return run


def copied(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-images", "0"], ["num_images=0", "at least 1"]),
        (["--num-images", "-3"], ["num_images=-3"]),
        (["--batch-size", "0"], ["batch_size=0"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--top-k", CODEBOOK + 1], [f"top_k={CODEBOOK + 1}", str(CODEBOOK)]),
        (["--top-k", "-1"], ["top_k=-1"]),
        (["--top-p", "0"], ["top_p=0.0", "(0, 1]"]),
        (["--top-p", "1.5"], ["top_p=1.5"]),
        (["--top-p", "nan"], ["top_p=nan"]),
        (["--temperature", "-1"], ["temperature=-1.0"]),
        (["--temperature", "nan"], ["temperature=nan"]),
        (["--condition-scale", "inf"], ["condition_scale=inf"]),
        (["--keep-rows", "2"], ["keep_rows=2"]),
        (["--num-best", "2"], ["num_best=2"]),
        (["--tile", "0x2"], ["tile=(0, 2)"]),
        (["--device", "gpu"], ["device='gpu'", "cuda"]),
        (["--device", "cuda:x"], ["cuda:x"]),
    ],
)
def test_options_out_of_range(refused, model, arguments, words):
    line = refused("a cat", "--model", model, *arguments)
    assert all(word in line for word in words), line


def test_no_cuda(refused, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "device='cuda'" in refused("a cat", "--model", model, "--device", "cuda")


def test_no_prompt(refused, model, tmp_path):
    assert "no prompt" in refused("--model", model)
    (tmp_path / "empty").write_text("\n \n")
    assert "no prompt" in refused("--model", model, "--prompts-file", tmp_path / "empty")


def test_galleries_that_cannot_be(refused, model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a cat"}\n{"prompt": 1}\n')
    assert "prompts.jsonl, line 2" in refused("--model", model, "--prompts", prompts)
    few = ("a cat", "--model", model, "--gallery")
    assert "no/such/judge" in refused(*few, "--rank-with", str(tmp_path / "no/such/judge"))
    assert "'a cat' does not follow the grammar" in refused(*few, "--rank-with", "shapes")
    assert "'a cat' does not follow the grammar" in refused("a cat", "--model", model, "--rank-with", "shapes")
    assert "num_best=2" in refused(*few, "--num-best", "2")


def test_missing_and_unreadable_files(refused, model, tmp_path):
    missing = tmp_path / "missing"
    for option in ("--model", "--vqgan", "--prompts-file", "--init-image"):
        assert str(missing) in refused("a cat", "--model", model, option, missing), option
    (tmp_path / "binary").write_bytes(b"a cat\xff\xfe")
    assert "UTF-8" in refused("--model", model, "--prompts-file", tmp_path / "binary")
    assert "binary" in refused("a", "--model", model, "--init-image", tmp_path / "binary")
    Image.effect_noise((64, 64), 90).save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    for size in (20, len(data) // 2):
        (tmp_path / "half.png").write_bytes(data[:size])
        assert "half.png" in refused("a", "--model", model, "--init-image", tmp_path / "half.png")


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(refused, tmp_path):
    (tmp_path / "file").touch()
    # No such model: had it been looked for, the message would be about it.
    for output in ("file", "file/below"):
        for more in ([], ["--gallery"]):
            line = refused("a", "--model", "/no/model", "--output", tmp_path / output, *more)
            assert "cannot write to --output" in line


def test_weights_that_are_not_numbers(refused, model, tmp_path):
    folder = copied(model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in refused("a", "--model", folder)


def test_another_type_of_model(refused, model, tmp_path):
    assert "vqgan" in refused("a", "--model", model / "vqgan")
    assert "dallebart" in refused("a", "--model", model, "--vqgan", model)
    folder = copied(model, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    assert "bert" in refused("a", "--model", folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_length": "x"}, ["image_length", "expected int", "'x'"]),
        ({"ln_type": None}, ["ln_type"]),
        ({"dropout": "a"}, ["dropout", "'a'"]),
        ({"use_glu": "yes"}, ["use_glu", "'yes'"]),
        ({"d_model": 2**40}, [f"d_model={2**40}", "at most 65536"]),
        ({"encoder_layers": 2_000_000}, ["encoder_layers=2000000", "at most 1000"]),
    ],
)
def test_a_configuration_with_impossible_values(refused, model, tmp_path, options, words):
    folder = copied(model, tmp_path)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    line = refused("a", "--model", folder)
    assert all(word in line for word in [str(folder), *words]), line


def test_a_configuration_of_the_vqgan_with_impossible_values(refused, model, tmp_path):
    folder = copied(model, tmp_path)
    config = folder / "vqgan" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ch": "a"}))
    assert "Field 'ch' expected int" in refused("a", "--model", folder)


def test_a_vqgan_with_too_small_a_codebook(refused, model, tmp_path):
    tiny_vqgan(n_embed=4).save_pretrained(tmp_path / "small")
    # A vocabulary that exceeds the codebook by more than special tokens would.
    folder = copied(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "decoder.embed_tokens.weight"):
        weights[name] = torch.cat([weights[name]] * 4)
    config["image_vocab_size"] = len(weights["lm_head.weight"]) - 1
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused("a", "--model", folder, "--vqgan", tmp_path / "small")
    assert "4 entries" in line
    assert f"{config['image_vocab_size']} image tokens" in line


def test_a_vqgan_of_another_size(refused, model, tmp_path):
    tiny_vqgan(resolution=32).save_pretrained(tmp_path / "large")
    line = refused("a", "--model", model, "--vqgan", tmp_path / "large")
    assert "64 codes" in line
    assert "draws 16" in line


def test_damaged_weights(refused, model, tmp_path):
    folder = copied(model, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("a", "--model", folder)
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused("a", "--model", folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in refused("a", "--model", folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: b"\xdf\xff\xff\xff\xff" + data[5:],  # a map of four thousand million entries
        lambda data: b"\x91" * 100_000,  # lists in lists
        lambda data: b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",  # an array of 4 GiB in a file of ten bytes
        lambda data: b"\x81\xa1a\xc7\x05\x07print",  # an unknown extension
    ],
    ids=["half", "three bytes", "empty", "bomb of entries", "bomb of depth", "length beyond the file", "extension"],
)
def test_a_hostile_msgpack(refused, tmp_path, damage):
    folder = shutil.copytree(MSGPACK, tmp_path / "msgpack")
    data = (folder / "flax_model.msgpack").read_bytes()
    (folder / "flax_model.msgpack").write_bytes(damage(data))
    assert "msgpack" in refused("a", "--model", folder)


def test_pickles_need_trust(refused):
    assert "trust" in refused("a", "--model", GOLDENS / "min-dalle")


def test_a_demo_of_another_size_and_odd_numbers(refused, model):
    assert "16 x 16 pixels" in refused("--model", model, command="demo")
    for number in ("0", "3", "-2"):
        assert f"--prompts {number}" in refused("--prompts", number, command="demo")


def test_no_network(refused):
    # Tests have a closed port for the hub's address.
    assert "somebody/some-model" in refused("a", "--model", "somebody/some-model")
