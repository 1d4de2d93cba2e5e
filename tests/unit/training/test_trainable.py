"""Which parameters are trained, and embeddings drawn anew."""

import pytest
import torch

from dalle_torch.training.trainable import choose_trained, reinitialize_embeddings
from tests.tiny_pipeline import tiny_model

TABLES = [
    "encoder.embed_tokens.weight",
    "encoder.embed_positions.weight",
    "decoder.embed_tokens.weight",
    "decoder.embed_positions.weight",
    "lm_head.weight",
]


def trained(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_all_is_all() -> None:
    model = tiny_model()
    assert choose_trained(model, ["all"]) == trained(model) == [name for name, _ in model.named_parameters()]


def test_embeddings_are_tables_and_lm_head() -> None:
    model = tiny_model()
    assert choose_trained(model, ["embeddings"]) == trained(model)
    assert sorted(trained(model)) == sorted(TABLES)


def test_patterns_add_up_and_the_rest_is_frozen_again() -> None:
    model = tiny_model()
    choose_trained(model, ["all"])
    choose_trained(model, ["decoder.layers.*.cross_attn.*", "lm_head.weight"])
    names = trained(model)
    assert "lm_head.weight" in names and "decoder.layers.1.cross_attn.q_proj.weight" in names
    assert all(".cross_attn." in name or name == "lm_head.weight" for name in names)


def test_a_pattern_without_a_match_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"match no parameter: decoder\.layer\.\*, nonsense"):
        choose_trained(tiny_model(), ["decoder.layer.*", "lm_head.weight", "nonsense"])


def test_embeddings_are_drawn_anew_and_nothing_else() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert sorted(reinitialize_embeddings(model, seed=3)) == sorted(TABLES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in TABLES), name
    std = model.encoder.embed_tokens.weight.std().item()
    assert std == pytest.approx(model.config.init_std, rel=0.05)  # 9,600 numbers: three standard errors are 2 %
    again = tiny_model()
    reinitialize_embeddings(again, seed=3)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
