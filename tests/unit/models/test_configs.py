"""The model configurations that come with the project: each builds the network that its name says."""

import json
from pathlib import Path

import pytest
import torch

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart

FOLDER = Path(__file__).parents[3] / "configs" / "model"
MINI = json.loads((FOLDER / "mini.json").read_text())
PARAMETERS = {"mega": 2.59e9, "mini": 0.438e9, "micro": 0.125e9}
"""Of the published models: 2.6 and 0.4 billion."""


def _changed(path: Path) -> set[str]:
    values = json.loads(path.read_text())
    return {key for key in values.keys() | MINI.keys() if values.get(key) != MINI.get(key)}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_key_is_known_and_the_network_builds(path: Path) -> None:
    values = json.loads(path.read_text())
    assert values.keys() <= DalleBartConfig.__dataclass_fields__.keys()
    config = DalleBartConfig.from_pretrained(path)
    assert {key: getattr(config, key) for key in values} == values
    with torch.device("meta"):
        model = DalleBart(config)
    if path.stem in PARAMETERS:
        assert model.num_parameters() == pytest.approx(PARAMETERS[path.stem], rel=0.02)


def test_the_variants_change_one_thing_of_mini() -> None:
    variants = {path.stem.removeprefix("mini-"): _changed(path) for path in FOLDER.glob("mini-*.json")}
    assert variants == {
        "preln": {"ln_positions"},
        "postln": {"ln_positions"},
        "cogview": {"ln_positions"},
        "deepnet": {"ln_positions", "use_deepnet_scaling"},
        "subln": {"ln_positions", "use_subln_init"},
        "swinv2": {
            "ln_positions", "use_cosine_attention", "use_swin_position_embeddings", "use_absolute_position_embeddings",
        },
        "rmsnorm": {"ln_type"},
        "swish": {"activation_function"},
        "smelu": {"activation_function"},
        "ffn": {"use_glu", "encoder_ffn_dim", "decoder_ffn_dim"},
        "headscale": {"use_head_scale"},
        "sinkhorn": {"sinkhorn_iters"},
        "bias": {"use_bias"},
    }  # fmt: skip


def test_the_published_token_ids_of_mega() -> None:
    mega = DalleBartConfig.from_pretrained(FOLDER / "mega.json")
    assert (mega.bos_token_id, mega.pad_token_id, mega.eos_token_id) == (16385, 16385, 16385)
    assert (mega.decoder_start_token_id, mega.image_vocab_size, mega.encoder_vocab_size) == (16384, 16415, 50272)
