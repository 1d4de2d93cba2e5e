"""Foreign VQGAN checkpoints: names, configurations, and files that are not what they seem."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from dalle_torch.models.convert.flax_vqgan import flax_vqgan_tensors
from dalle_torch.models.convert.taming import read_taming, read_taming_config
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.storage import CheckpointError
from tests.helpers import GOLDENS
from tests.unit.models.test_vqgan import small_config

VQ = GOLDENS / "vqgan" / "taming-vq"
FLAX = GOLDENS / "vqgan" / "flax"


@pytest.mark.parametrize(
    ("path", "shape", "ours", "our_shape"),
    [
        ("encoder/down_0/block_1/conv1/kernel", (3, 3, 5, 7), "encoder.down.0.block.1.conv1.weight", (7, 5, 3, 3)),
        ("decoder/up_4/attn_2/norm/scale", (8,), "decoder.up.4.attn.2.norm.weight", (8,)),
        ("decoder/mid/attn_1/q/bias", (8,), "decoder.mid.attn_1.q.bias", (8,)),
        ("encoder/mid/block_2/norm1/bias", (8,), "encoder.mid.block_2.norm1.bias", (8,)),
        ("quantize/embedding/embedding", (9, 4), "quantize.embedding.weight", (9, 4)),
        ("params/quant_conv/kernel", (1, 1, 4, 6), "quant_conv.weight", (6, 4, 1, 1)),
        ("something/else", (2,), "something/else", (2,)),
    ],
)
def test_flax_names(path: str, shape: tuple[int, ...], ours: str, our_shape: tuple[int, ...]) -> None:
    ((name, tensor),) = flax_vqgan_tensors([(tuple(path.split("/")), torch.zeros(shape))])
    assert (name, tuple(tensor.shape)) == (ours, our_shape)


def test_flax_kernels_are_turned() -> None:
    kernel = torch.arange(3 * 3 * 2 * 4).view(3, 3, 2, 4)
    ((_, weight),) = flax_vqgan_tensors([(("conv_in", "kernel"), kernel)])
    assert weight[3, 1, 0, 2] == kernel[0, 2, 1, 3]


@pytest.mark.parametrize("said", [None, [-1, 1]])
def test_flax_pixel_range_is_what_the_configuration_says(tmp_path: Path, said: list[int] | None) -> None:
    shutil.copytree(FLAX, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **({"pixel_range": said} if said else {})}))
    assert VQGAN.from_pretrained(tmp_path).config.pixel_range == ((-1, 1) if said else (0, 1))
    assert VQGAN.from_pretrained(tmp_path, pixel_range=(-2, 2)).config.pixel_range == (-2, 2)


def test_safetensors_beside_a_configuration_without_range_mean_the_default(tmp_path: Path) -> None:
    VQGAN(small_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pixel_range"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert VQGAN.from_pretrained(tmp_path).config.pixel_range == (-1, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(VQ, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edited(folder: Path, **params: object) -> Path:
    """model.yaml with other params; None removes one; `ddconfig` is merged."""
    config = yaml.safe_load((VQ / "model.yaml").read_text())
    for key, value in params.items():
        target = config["model"] if key == "target" else config["model"]["params"]
        if key == "ddconfig":
            target[key].update(value)
            target[key] = {name: entry for name, entry in target[key].items() if entry is not None}
        elif value is None:
            del target[key]
        else:
            target[key] = value
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"target": "taming.models.cond_transformer.Net2NetTransformer"}, "Net2NetTransformer.*known are VQModel"),
        ({"n_embed": None, "ddconfig": {"ch": None}}, "lacks params.n_embed, params.ddconfig.ch"),
        ({"remap": "codes.npy"}, "remap"),
        ({"ddconfig": {"double_z": True}}, "double_z"),
        ({"ddconfig": {"resolution": "big"}}, "resolution"),
        ({"kl_weight": "heavy"}, "kl_weight='heavy'"),
    ],
)
def test_taming_configurations_that_cannot_be(folder: Path, params: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_taming_config(edited(folder, **params))
    assert "\n" not in str(caught.value)


def test_numbers_that_yaml_takes_for_strings(folder: Path) -> None:
    edited(folder, target="taming.models.vqgan.GumbelVQ", kl_weight="PLACE")
    text = (folder / "model.yaml").read_text().replace("PLACE", "5e-4")
    (folder / "model.yaml").write_text(text)
    config = read_taming_config(folder)
    assert (config.quantizer, config.kl_weight) == ("gumbel", 5e-4)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch /tmp/never']",
        "a: [",
        "[1, 2]",
        "model: 3",
        "[" * 2000,
        "# " + "x" * (1 << 20),
        "\x00",
    ],
    ids=["object", "open", "list", "number", "nested", "large", "binary"],
)
def test_hostile_yaml(folder: Path, text: str) -> None:
    (folder / "model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.yaml") as caught:
        read_taming_config(folder)
    assert len(str(caught.value)) < 1000


def test_pickles_need_trust(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="trust_pickle=True"):
        VQGAN.from_pretrained(folder)


class Callback:
    """Stands for what a training run leaves in its checkpoint beside tensors."""


@pytest.mark.parametrize("extra", ["callback", "old format", "bare"])
def test_checkpoints_of_every_kind(folder: Path, extra: str) -> None:
    expected = VQGAN.from_pretrained(VQ, trust_pickle=True).state_dict()
    held = torch.load(folder / "last.ckpt", weights_only=True)
    if extra == "callback":
        held["callbacks"] = Callback()
    if extra == "bare":
        held = held["state_dict"]
    torch.save(held, folder / "last.ckpt", _use_new_zipfile_serialization=extra != "old format")
    found = VQGAN.from_pretrained(folder, trust_pickle=True).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_losses_are_left_out() -> None:
    held = torch.load(VQ / "last.ckpt", weights_only=True)["state_dict"]
    assert any(name.startswith("loss.") for name in held)
    names = [name for name, _ in read_taming(VQ, read_taming_config(VQ))]
    assert names == [name for name in held if not name.startswith("loss.")]


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04broken"])
def test_damaged_checkpoints(folder: Path, content: bytes) -> None:
    (folder / "last.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt") as caught:
        VQGAN.from_pretrained(folder, trust_pickle=True)
    assert "\n" not in str(caught.value)


def test_truncated_checkpoint(folder: Path) -> None:
    whole = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        VQGAN.from_pretrained(folder, trust_pickle=True)


@pytest.mark.parametrize(
    "held", [[1, 2], {"state_dict": {}}, {"state_dict": {"a": 1}}, {"state_dict": {3: torch.zeros(1)}}], ids=str
)
def test_checkpoints_without_weights(folder: Path, held: object) -> None:
    torch.save(held, folder / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        VQGAN.from_pretrained(folder, trust_pickle=True)


def test_weights_that_do_not_fit_are_listed(folder: Path) -> None:
    held = torch.load(folder / "last.ckpt", weights_only=True)
    del held["state_dict"]["encoder.conv_in.bias"]
    held["state_dict"]["colorize"] = torch.zeros(3)
    held["state_dict"]["decoder.conv_out.bias"] = torch.zeros(4)
    torch.save(held, folder / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"(?s)encoder.conv_in.bias.*colorize.*decoder.conv_out.bias"):
        VQGAN.from_pretrained(folder, trust_pickle=True)
