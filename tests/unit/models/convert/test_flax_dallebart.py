"""Names of the original's Flax tree, for every configuration."""

from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from dalle_torch.models.configuration import DalleBartConfig, LayerNormPositions
from dalle_torch.models.convert.flax_dallebart import flax_entries, read_flax_dallebart
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.storage import CheckpointError
from tests.helpers import GOLDENS
from tests.unit.models.conftest import small_config
from tests.unit.models.convert.flax_files import nest, pack_tree, unpack_tree

FOLDERS = sorted(path.name for path in (GOLDENS / "dallebart").iterdir())


@pytest.mark.parametrize("name", FOLDERS)
def test_names_and_shapes_are_those_of_the_original(name: str) -> None:
    folder = GOLDENS / "dallebart" / name
    config = DalleBartConfig.from_pretrained(folder)
    stored = unpack_tree(folder / "flax_model.msgpack")
    entries = flax_entries(config)
    assert {entry.path for entry in entries.values()} == set(stored)
    assert len(set(entries.values())) == len(entries), "no two parameters share a place"
    gradients = {key.removeprefix("grad:") for key in np.load(folder / "io.npz") if key.startswith("grad:")}
    assert gradients == set(stored)
    with torch.device("meta"):
        expected = DalleBart(config).state_dict()
    assert entries.keys() == expected.keys()
    for ours, entry in entries.items():
        assert entry.to_ours(torch.from_numpy(stored[entry.path].copy())).shape == expected[ours].shape, ours


@pytest.mark.parametrize(
    ("layout", "norm", "options"),
    list(
        product(
            get_args(LayerNormPositions),
            ("layernorm", "rmsnorm"),
            (
                {},
                {"use_glu": False, "use_bias": True, "force_ln_scale": True, "use_final_ln_encoder": False},
                {
                    "use_head_scale": True,
                    "use_swin_position_embeddings": True,
                    "use_absolute_position_embeddings": False,
                },
                {"use_scan": True, "use_final_ln_decoder": False},
            ),
        )
    ),
)
def test_every_configuration_has_a_place_for_each_of_its_parameters(
    layout: str, norm: str, options: dict[str, object]
) -> None:
    if layout == "swinv2" and "use_scan" in options:
        options = {"use_cosine_attention": True}
    config = small_config(ln_positions=layout, ln_type=norm, encoder_layers=7, decoder_layers=3, **options)
    with torch.device("meta"):
        expected = DalleBart(config).state_dict()
    for stacked in (False, True):
        entries = flax_entries(config, stacked=stacked)
        assert entries.keys() == expected.keys()
        assert len(set(entries.values())) == len(entries)


def test_layers_are_unstacked_whatever_the_configuration_says(tmp_path: Path) -> None:
    stored = unpack_tree(GOLDENS / "dallebart" / "normformer-glu-scan" / "flax_model.msgpack")
    single = {
        f"{head}Layer_{i}/{rest}" if tail else path: values[i] if tail else values
        for path, values in stored.items()
        for head, tail, rest in [path.partition("Layers/")]
        for i in range(3 if tail else 1)
    }
    (tmp_path / "flax_model.msgpack").write_bytes(pack_tree({"params": nest(single)}))
    config = DalleBartConfig.from_pretrained(GOLDENS / "dallebart" / "normformer-glu-scan")
    expected = dict(read_flax_dallebart(GOLDENS / "dallebart" / "normformer-glu-scan", config))
    assert len(expected) == 104
    for use_scan in (False, True):
        config.use_scan = use_scan
        found = dict(read_flax_dallebart(tmp_path, config))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_number_of_stacked_layers_is_one_clear_error() -> None:
    folder = GOLDENS / "dallebart" / "normformer-glu-scan"
    config = DalleBartConfig.from_pretrained(folder, decoder_layers=5)
    with pytest.raises(CheckpointError, match=r"stacks 3 layers in model/decoder/.*, but the configuration has 5"):
        list(read_flax_dallebart(folder, config))


def test_what_has_no_place_keeps_its_own_name(tmp_path: Path) -> None:
    tree = {"model": {"encoder": {"final_ln": {"scale": np.ones(32, np.float32)}}}, "opt_state": np.float32(1)}
    (tmp_path / "flax_model.msgpack").write_bytes(pack_tree(tree))
    found = dict(read_flax_dallebart(tmp_path, small_config()))
    assert list(found) == ["model/encoder/final_ln/scale", "opt_state"]
