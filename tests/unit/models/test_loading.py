"""Checkpoints from anywhere: formats, dtypes, places, and everything that can be wrong with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig

import dalle_torch  # noqa: F401 (tells transformers' auto classes)
from dalle_torch.models.configuration import DalleBartConfig, VQGANConfig
from dalle_torch.models.convert.flax_dallebart import flax_entries
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.storage import CheckpointError
from tests.helpers import GOLDENS
from tests.unit.models.convert.flax_files import nest, pack_tree, unpack_tree

FOLDERS = sorted(path.name for path in (GOLDENS / "dallebart").iterdir())
GOLDEN = GOLDENS / "dallebart" / "normformer-glu"


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same numbers, bit by bit, under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object], source: Path = GOLDEN) -> Path:
    """A copy of a Flax checkpoint in `folder` with its tree changed."""
    tree = unpack_tree(source / "flax_model.msgpack")
    change(tree)
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source / "config.json", folder / "config.json")
    (folder / "flax_model.msgpack").write_bytes(pack_tree(nest(tree)))
    return folder


@pytest.fixture(scope="module")
def model() -> DalleBart:
    return DalleBart.from_pretrained(GOLDEN)


@pytest.fixture
def saved(model: DalleBart, tmp_path: Path) -> Path:
    """The golden model as one safetensors file."""
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", FOLDERS)
def test_every_number_of_the_original_arrives_and_survives_saving(name: str, tmp_path: Path) -> None:
    folder = GOLDENS / "dallebart" / name
    stored = unpack_tree(folder / "flax_model.msgpack")
    model = DalleBart.from_pretrained(folder)
    assert not model.training
    weights = model.state_dict()
    for ours, entry in flax_entries(model.config).items():
        expected = entry.to_ours(torch.from_numpy(stored[entry.path].copy()))
        assert torch.equal(weights[ours], expected), ours
        assert weights[ours].is_contiguous()
        assert model.get_parameter(ours).requires_grad
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["DalleBart"]
    assert same(DalleBart.from_pretrained(tmp_path), model)


def test_shards_are_read(model: DalleBart, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(DalleBart.from_pretrained(tmp_path), model)


def test_transformers_auto_classes_load_the_original(model: DalleBart) -> None:
    assert isinstance(AutoConfig.from_pretrained(GOLDEN), DalleBartConfig)
    found = AutoModelForSeq2SeqLM.from_pretrained(GOLDEN)
    assert type(found) is DalleBart
    assert same(found, model)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "torch.float64", "auto", None])
def test_dtype(model: DalleBart, saved: Path, dtype: str | torch.dtype | None) -> None:
    wanted = {"bfloat16": torch.bfloat16, "torch.float64": torch.float64, torch.float16: torch.float16}.get(
        dtype, torch.float32
    )
    for source in (GOLDEN, saved):
        found = DalleBart.from_pretrained(source, dtype=dtype)
        assert {parameter.dtype for parameter in found.parameters()} == {wanted}
        assert found.dtype == found.config.dtype == wanted
        assert torch.equal(found.lm_head.weight, model.lm_head.weight.to(wanted))


def test_auto_takes_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    folder = rewrite(tmp_path, lambda tree: tree.update({k: v.astype(np.float16) for k, v in tree.items()}))
    assert DalleBart.from_pretrained(folder).dtype == torch.float16
    assert DalleBart.from_pretrained(folder, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float23", "int8", torch.int64, "nn"])
def test_a_dtype_that_is_none_is_refused(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="is no floating-point dtype: use float32"):
        DalleBart.from_pretrained(GOLDEN, dtype=dtype)


def test_a_configuration_of_the_caller_and_single_values(model: DalleBart, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    shutil.copyfile(GOLDEN / "flax_model.msgpack", tmp_path / "weights" / "flax_model.msgpack")
    with pytest.raises(FileNotFoundError, match=r"pass config=DalleBartConfig\(...\), or write .* --config FILE"):
        DalleBart.from_pretrained(tmp_path / "weights")
    config = DalleBartConfig.from_pretrained(GOLDEN)
    for given in (config, GOLDEN, GOLDEN / "config.json"):
        assert same(DalleBart.from_pretrained(tmp_path / "weights", config=given), model)
    changed = DalleBart.from_pretrained(tmp_path / "weights", config=config, activation_dropout=0.5)
    assert (changed.config.activation_dropout, config.activation_dropout) == (0.5, 0.0)
    assert DalleBart.from_pretrained(GOLDEN, dropout=0.25).config.dropout == 0.25
    with pytest.raises(ValueError, match="config is a VQGANConfig, but DalleBart needs a DalleBartConfig"):
        DalleBart.from_pretrained(GOLDEN, config=VQGANConfig())


def test_options_that_ask_for_nothing_change_nothing(model: DalleBart, saved: Path) -> None:
    idle = {"force_download": False, "proxies": None, "use_safetensors": True, "attn_implementation": "sdpa"}
    for source in (GOLDEN, saved):
        assert same(DalleBart.from_pretrained(source, **idle, low_cpu_mem_usage=True), model)


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("force_download", True, "force_download=True: remove the copy in the cache"),
        ("proxies", {"https": "http://proxy"}, "HTTPS_PROXY"),
        ("use_safetensors", False, "use_safetensors=False: safetensors are read where there are any"),
        ("attn_implementation", "eager", "attn_implementation='eager': there is 'sdpa' alone"),
        ("temprature", 1, "temprature: there is no such option"),
    ],
)
def test_options_that_cannot_be_had_are_refused_for_every_format(
    saved: Path, option: str, value: object, remedy: str
) -> None:
    for source in (GOLDEN, saved):
        with pytest.raises(ValueError, match="DalleBart.from_pretrained cannot use ") as error:
            DalleBart.from_pretrained(source, **{option: value})
        assert remedy in str(error.value)


def test_all_options_that_cannot_be_had_are_told_at_once() -> None:
    message = "force_download=True: .*; x, y: .*; variant with Flax weights: convert them first"
    with pytest.raises(ValueError, match=message):
        DalleBart.from_pretrained(GOLDEN, y=1, variant="fp16", x=2, force_download=True)


def test_loading_info_is_empty_when_all_is_well(saved: Path) -> None:
    for source in (GOLDEN, saved):
        _, info = DalleBart.from_pretrained(source, output_loading_info=True)
        assert not any(info.values())


# --- What does not fit ----------------------------------------------------------------------------------------------

LOST = [
    "model/encoder/final_ln/bias",
    "model/decoder/layers/FlaxBartDecoderLayer_0/FlaxBartAttention_1/q_proj/kernel",
    "lm_head/kernel",
]


def break_everything(tree: dict[str, np.ndarray]) -> None:
    for name in LOST:
        del tree[name]
    tree["model/encoder/extra"] = np.ones((2, 3), np.float32)
    tree["model/encoder/final_ln/scale"] = np.ones(32, np.float32)
    tree["model/decoder/embed_tokens/embedding"] = np.ones((40, 32), np.float32)
    tree["model/encoder/embed_tokens/embedding"] = np.ones((50, 32), np.int32)


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        DalleBart.from_pretrained(rewrite(tmp_path, break_everything))
    message = str(error.value)
    assert "\n" not in message
    assert "3 missing: encoder.final_norm.bias, decoder.layers.0.cross_attn.q_proj.weight, lm_head.weight" in message
    assert "2 unexpected: model/encoder/extra [2, 3], model/encoder/final_ln/scale [32]" in message
    assert "1 of another shape: decoder.embed_tokens.weight is [40, 32] instead of [41, 32]" in message
    assert "1 of another kind: encoder.embed_tokens.weight is int32" in message


def test_half_of_the_weights_missing_lists_every_one(saved: Path, tmp_path: Path) -> None:
    names: list[str] = []

    def halve(tree: dict[str, np.ndarray]) -> None:
        entries = {entry.path: ours for ours, entry in flax_entries(DalleBartConfig.from_pretrained(GOLDEN)).items()}
        for path in list(tree)[::2]:
            names.append(entries[path])
            del tree[path]

    flax = rewrite(tmp_path / "flax", halve)
    tensors = load_file(saved / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in names}, saved / "model.safetensors", {"format": "pt"})
    for folder in (flax, saved):
        with pytest.raises(CheckpointError, match=f"{len(names)} missing") as error:
            DalleBart.from_pretrained(folder)
        assert all(name in str(error.value) for name in names)


def test_safetensors_that_do_not_fit_are_never_filled_up(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].clone()
    tensors["stranger"] = torch.ones(2)
    del tensors["encoder.final_norm.bias"]
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(CheckpointError) as error:
            DalleBart.from_pretrained(saved, **options)
        assert "1 missing: encoder.final_norm.bias" in str(error.value)
        assert "1 unexpected: stranger [2]" in str(error.value)
        assert "lm_head.weight is [40, 32] instead of [41, 32]" in str(error.value)


def test_the_wrong_configuration_is_told_by_shapes() -> None:
    config = DalleBartConfig.from_pretrained(GOLDEN, encoder_layers=3, use_bias=True, d_model=64)
    with pytest.raises(CheckpointError, match=r"missing: .*encoder\.layers\.2\..*lm_head\.weight is \[41, 32\]"):
        DalleBart.from_pretrained(GOLDEN, config=config)


# --- Damaged and foreign folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 100, 0.5, 0.999])
def test_truncated_files_are_told_as_such(saved: Path, tmp_path: Path, part: float) -> None:
    rewrite(tmp_path / "flax", lambda tree: None)
    for path in (tmp_path / "flax" / "flax_model.msgpack", saved / "model.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
        with pytest.raises(CheckpointError, match=path.name):
            DalleBart.from_pretrained(path.parent)


def test_broken_shards_and_indices(model: DalleBart, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    held = first.read_bytes()
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of .* parts: {first.name}"):
        DalleBart.from_pretrained(tmp_path)
    first.write_bytes(held)
    for bad in ('{"weight_map": 3}', "[]", "{", '{"weight_map": {"a": 3}}'):
        index.write_text(bad)
        with pytest.raises(CheckpointError, match="is not an index of safetensors files"):
            DalleBart.from_pretrained(tmp_path)
    index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], "x": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        DalleBart.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="not their index"):
        DalleBart.from_pretrained(tmp_path)


def test_another_type_of_model_is_refused_by_name(tmp_path: Path) -> None:
    BartConfig().save_pretrained(tmp_path)
    shutil.copyfile(GOLDEN / "flax_model.msgpack", tmp_path / "flax_model.msgpack")
    with pytest.raises(CheckpointError, match="holds a model of type 'bart', but DalleBart loads 'dallebart'"):
        DalleBart.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a model of type 'dallebart', but VQGAN loads 'vqgan'"):
        VQGAN.from_pretrained(GOLDEN)
    with pytest.raises(CheckpointError, match=r"names no model_type, and its keys .* are not those of 'dallebart'"):
        DalleBart.from_pretrained(GOLDENS / "vqgan" / "flax")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\xff", "[" * 100_000])
def test_a_broken_config_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    shutil.copyfile(GOLDEN / "flax_model.msgpack", tmp_path / "flax_model.msgpack")
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds no object)"):
        DalleBart.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model_class", "options", "words"),
    [
        (DalleBart, {"image_length": "x"}, ["image_length", "expected int", "'x'"]),
        (DalleBart, {"ln_type": None}, ["ln_type", "None"]),
        (DalleBart, {"dropout": "a"}, ["dropout", "'a'"]),
        (DalleBart, {"use_glu": "yes"}, ["use_glu", "'yes'"]),
        (DalleBart, {"dropout": float("nan")}, ["dropout=nan"]),
        (DalleBart, {"d_model": 2**40}, [f"d_model={2**40} must be at most 65536"]),
        (DalleBart, {"encoder_layers": 2_000_000}, ["encoder_layers=2000000 must be at most 1000"]),
        (
            DalleBart,
            {"decoder_layers": 1001, "image_vocab_size": 10**9, "image_length": 10**9},
            ["decoder_layers=1001", "image_vocab_size=1000000000", "at most 10000000", "image_length=1000000000"],
        ),
        (DalleBart, {"decoder_start_token_id": 41}, ["decoder_start_token_id=41", "image_vocab_size=40"]),
        (DalleBart, {"tau_init": 0.0}, ["tau_init=0.0"]),
        (DalleBart, {"init_std": -1.0}, ["init_std=-1.0"]),
        (VQGAN, {"ch": "a"}, ["ch", "expected int", "'a'"]),
        (VQGAN, {"pixel_range": [0.0]}, ["pixel_range=[0.0]"]),
        (VQGAN, {"n_embed": 2**40, "resolution": 2**40}, [f"n_embed={2**40}", f"resolution={2**40}"]),
        (VQGAN, {"ch_mult": [1] * 100_000}, ["ch_mult has 100000 levels", "at most 16"]),
        (VQGAN, {"ch_mult": [1, 2**40]}, [f"ch_mult=(1, {2**40})", "1024"]),
    ],
)
def test_a_configuration_that_cannot_be_is_told_with_its_source(
    tmp_path: Path, model_class: type, options: dict, words: list[str]
) -> None:
    source = GOLDEN if model_class is DalleBart else GOLDENS / "vqgan" / "flax"
    folder = shutil.copytree(source, tmp_path / "source")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **options}))
    for given in ({}, {"config": folder}):
        with pytest.raises(CheckpointError) as error:
            model_class.from_pretrained(folder if not given else source, **given)
        message = str(error.value)
        assert message.startswith(f"{folder}: its configuration cannot be used: ")
        assert "\n" not in message
        assert all(word in message for word in words), message


@pytest.mark.parametrize("absent", [3, ["head"], [["encoder"]]])
def test_absent_modules_that_are_no_part_of_the_model(absent: object) -> None:
    config = DalleBartConfig.from_pretrained(GOLDEN)
    config.absent_modules = absent
    with pytest.raises(ValueError, match="absent_modules of the configuration names no part of the model"):
        DalleBart.from_pretrained(GOLDEN, config=config)


def test_the_largest_sizes_are_those_of_no_model() -> None:
    # Sizes that DALL·E Mega's successors could have stay far below.
    DalleBartConfig(encoder_layers=200, d_model=16_384, encoder_ffn_dim=65_536, image_length=4096)
    VQGANConfig(ch=512, n_embed=1 << 18, resolution=4096)


def test_a_number_that_no_number_can_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"d_model": ' + "9" * 5000 + "}")
    shutil.copyfile(GOLDEN / "flax_model.msgpack", tmp_path / "flax_model.msgpack")
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        DalleBart.from_pretrained(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no weights that DalleBart can read .*it holds pytorch_model\.bin"):
        DalleBart.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no subfolder 'inner'"):
        DalleBart.from_pretrained(tmp_path, subfolder="inner")
    with pytest.raises(FileNotFoundError):
        DalleBart.from_pretrained(tmp_path / "nowhere")


def test_pickles_are_read_for_those_who_trust_them_only() -> None:
    with pytest.raises(CheckpointError, match=r"encoder\.pt, decoder\.pt\), which are pickles .* trust_pickle=True"):
        DalleBart.from_pretrained(GOLDENS / "min-dalle")
