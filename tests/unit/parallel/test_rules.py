"""The table of layouts: every parameter of every variant has a rule, and every rule a parameter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.parallel.rules import Rule, Spec, lay_out, layout_rules

CONFIGS = {path.stem: path for path in (Path(__file__).parents[3] / "configs" / "model").glob("*.json")}
SMALL = {
    "encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 32, "encoder_vocab_size": 40, "image_vocab_size": 31, "image_length": 8,
    "max_text_length": 8,
}  # fmt: skip
FLAGS = (
    "use_bias", "use_glu", "use_head_scale", "use_absolute_position_embeddings", "use_swin_position_embeddings",
    "force_ln_scale", "use_final_ln_encoder", "use_final_ln_decoder",
)  # fmt: skip


def shapes_of(config: DalleBartConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = DalleBart(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def specs_of(config: DalleBartConfig, mp: int = 1, uneven: str = "refuse") -> dict[str, Spec]:
    return lay_out(shapes_of(config), layout_rules(config), {"dp": 2, "mp": mp}, uneven)  # type: ignore[arg-type]


def expected_spec(name: str) -> Spec:
    """The layout once more, in other words."""
    module, kind = name.split(".")[-2:]
    if kind in ("bias", "head_scale") or "norm" in module:
        return (None,)
    return (None, "mp") if module in ("out_proj", "down_proj", "position_bias") else ("mp", None)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_configuration_is_laid_out_whole(name: str) -> None:
    config = DalleBartConfig.from_pretrained(CONFIGS[name])
    shapes = shapes_of(config)
    specs = specs_of(config)
    assert specs == {parameter: expected_spec(parameter) for parameter in shapes}
    # Eight devices take all of them, and what they share is but vectors.
    specs_of(config, mp=8, uneven="pad")
    whole = sum(torch.Size(shapes[parameter]).numel() for parameter, spec in specs.items() if "mp" not in spec)
    assert whole < 0.01 * sum(torch.Size(shape).numel() for shape in shapes.values())


def test_mega_splits_evenly_over_eight() -> None:
    assert specs_of(DalleBartConfig.from_pretrained(CONFIGS["mega"]), mp=8)["lm_head.weight"] == ("mp", None)


@given(
    st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS}),
    st.sampled_from(["normformer", "swinv2", "cogview", "postln", "deepnet", "preln", "subln"]),
    st.sampled_from(["layernorm", "rmsnorm"]),
)
def test_every_combination_of_options_is_laid_out(flags: dict[str, bool], positions: str, norm: str) -> None:
    config = DalleBartConfig(**SMALL, **flags, ln_positions=positions, ln_type=norm)
    assert specs_of(config, mp=4) == {name: expected_spec(name) for name in shapes_of(config)}


def test_minis_sizes_are_refused_and_named_once() -> None:
    config = DalleBartConfig.from_pretrained(CONFIGS["mini"])
    with pytest.raises(ValueError, match="sizes that mp does not divide") as caught:
        specs_of(config, mp=8)
    message = str(caught.value)
    for line in (
        "decoder.embed_tokens.weight dimension 0 of 16385 over mp=8", "lm_head.weight dimension 0 of 16385 over mp=8",
        "encoder.layers.*.feed_forward.up_proj.weight dimension 0 of 2730 over mp=8",
        "decoder.layers.*.feed_forward.down_proj.weight dimension 1 of 2730 over mp=8",
        "set mesh.mp to a divisor of it, or mesh.uneven to pad",
    ):  # fmt: skip
        assert message.count(line) == 1
    assert "encoder.embed_tokens" not in message and "\n" not in message


def test_padding_leaves_no_device_empty() -> None:
    rules = [Rule("a", ("mp",)), Rule("b", ("mp",))]
    sizes = {"dp": 1, "mp": 8}
    assert lay_out({"a": (16385,), "b": (15,)}, rules, sizes, "pad") == {"a": ("mp",), "b": ("mp",)}
    # Of 14, seven devices hold two each and the eighth nothing.
    with pytest.raises(
        ValueError, match="empty even with .*: a dimension 0 of 14 over mp=8, b dimension 0 of 3 over mp=8"
    ):
        lay_out({"a": (14,), "b": (3,)}, rules, sizes, "pad")


def test_all_that_is_wrong_is_told_at_once() -> None:
    config = DalleBartConfig(**SMALL)
    shapes = shapes_of(config) | {"adapter.weight": (3,), "decoder.final_norm.other": (16,), "lm_head.weight": (32,)}
    rules = [*layout_rules(config), Rule(r"lm_head\.weight", ("mp", None)), Rule(r"head", (None,))]
    with pytest.raises(ValueError, match="the model cannot be laid out on the mesh") as caught:
        lay_out(shapes, rules, {"dp": 1, "mp": 3})
    message = str(caught.value)
    for words in (
        "parameters without a rule (add one to the table): adapter.weight, decoder.final_norm.other",
        r"rules that are no parameter's first match (remove them, or move them up): lm_head\.weight, head",
        "lm_head.weight has 1 dimensions for the 2 of ('mp', None)",
        "encoder.embed_tokens.weight dimension 0 of 40 over mp=3",
    ):  # fmt: skip
        assert words in message
    assert "\n" not in message


def test_the_first_match_wins_and_names_match_as_wholes() -> None:
    rules = [Rule(r"a\.weight", ("mp",)), Rule(r".*\.weight", (None,))]
    specs = lay_out({"a.weight": (8,), "aa.weight": (8,)}, rules, {"dp": 1, "mp": 2})
    assert specs == {"a.weight": ("mp",), "aa.weight": (None,)}


@given(st.integers(1, 500), st.integers(1, 12))
def test_padding_is_refused_where_a_device_would_stay_empty(size: int, mp: int) -> None:
    per_device = -(-size // mp)
    held = [max(0, min(per_device, size - device * per_device)) for device in range(mp)]
    assert sum(held) == size
    try:
        lay_out({"a": (size,)}, [Rule("a", ("mp",))], {"dp": 1, "mp": mp}, "pad")
    except ValueError:
        assert min(held) == 0
    else:
        assert min(held) > 0


@pytest.mark.parametrize("option", ["use_bias", "use_glu", "use_head_scale", "use_swin_position_embeddings"])
def test_the_rules_of_an_option_that_a_model_lacks_are_an_error(option: str) -> None:
    lacking, having = (DalleBartConfig(**SMALL, **{option: on}) for on in (False, True))
    strange = set(layout_rules(having)) - set(layout_rules(lacking))
    with pytest.raises(ValueError, match="no parameter's first match") as caught:
        lay_out(shapes_of(lacking), layout_rules(having), {"dp": 1, "mp": 1})
    assert all(rule.pattern in str(caught.value) for rule in strange)
    with pytest.raises(ValueError, match="parameters without a rule"):
        lay_out(shapes_of(having), layout_rules(lacking), {"dp": 1, "mp": 1})


def test_a_renamed_parameter_is_told_with_the_rule_that_lost_it() -> None:
    config = DalleBartConfig(**SMALL)
    rules = [
        replace(rule, pattern=r"head\.weight") if rule.pattern == r"lm_head\.weight" else rule
        for rule in layout_rules(config)
    ]
    with pytest.raises(ValueError, match=r"add one to the table\): lm_head.weight; rules .*: head\\.weight"):
        lay_out(shapes_of(config), rules, {"dp": 1, "mp": 1})
