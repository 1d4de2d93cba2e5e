"""The networks' own promises: initialisation, dropout, checkpointing, limits."""

import copy
import math

import pytest
import torch
from transformers.activations import ACT2FN

from dalle_torch.models.attention import Attention, sinkhorn
from dalle_torch.models.configuration import DalleBartConfig, VQGANConfig
from dalle_torch.models.feed_forward import SmeLU
from dalle_torch.models.layers import init_gain
from tests.unit.models.conftest import small_config, small_model

LAYOUTS = ["normformer", "swinv2", "cogview", "postln", "deepnet", "preln", "subln"]


def loss_of(model: torch.nn.Module, prompts: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    labels = torch.arange(27).view(3, 9) % 24
    return model(input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], labels=labels).loss


@pytest.mark.parametrize("ln_type", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_learns_and_is_saved_whole(layout: str, ln_type: str, prompts: dict, tmp_path) -> None:
    model = small_model(ln_positions=layout, ln_type=ln_type, init_std=0.02, encoder_layers=6, decoder_layers=7).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = loss_of(model, prompts)
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model, prompts).backward()
        # A parameter without a gradient would be one that the forward pass never uses.
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    last = loss_of(model.eval(), prompts)
    assert last < first
    model.save_pretrained(tmp_path)
    assert torch.equal(loss_of(type(model).from_pretrained(tmp_path), prompts), last)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_deepnet_scaling": True},
        {"use_subln_init": True, "ln_positions": "subln"},
        {"use_head_scale": True, "use_swin_position_embeddings": True},
    ],
)
def test_initial_standard_deviations(options: dict) -> None:
    model = small_model(d_model=256, encoder_ffn_dim=512, decoder_ffn_dim=512, init_std=0.02, use_bias=True, **options)
    names = " ".join(name for name, _ in model.named_parameters())
    assert ("head_scale" in names) == ("position_bias" in names) == ("use_head_scale" in options)
    for name, parameter in model.named_parameters():
        if name.endswith("head_scale"):
            assert torch.all(parameter == 1), name
        elif "norm" in name:
            assert torch.all(parameter == (1 if name.endswith("weight") else 0)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            side = "encoder" if name.startswith("encoder") else "decoder"
            scaled = any(part in name for part in ("v_proj", "out_proj", "feed_forward"))
            if "cross_attn" in name and model.config.use_subln_init:
                scaled = False
            expected = 0.02 * (init_gain(model.config, side) if scaled else 1)
            # The spread of an estimate from n numbers is 1 / sqrt(2 n); five of them make a false alarm unlikely.
            assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * parameter.numel())), name


def test_gains_are_those_of_the_papers() -> None:
    config = small_config(encoder_layers=24, decoder_layers=24, use_deepnet_scaling=True)
    assert init_gain(config, "encoder") == pytest.approx(0.87 * (24**4 * 24) ** -0.0625)
    assert init_gain(config, "decoder") == pytest.approx((12 * 24) ** -0.25)
    config = small_config(encoder_layers=24, decoder_layers=12, use_subln_init=True)
    assert init_gain(config, "encoder") == pytest.approx(math.sqrt(math.log(36) * math.log(48) / 3))
    assert init_gain(config, "decoder") == pytest.approx(math.sqrt(math.log(36)))


@pytest.mark.parametrize("which", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_acts_in_training_only(which: str, prompts: dict) -> None:
    model = small_model(**{which: 0.5})
    assert torch.equal(loss_of(model, prompts, 1), loss_of(model, prompts, 2))
    model.train()
    assert not torch.equal(loss_of(model, prompts, 1), loss_of(model, prompts, 2))
    assert torch.equal(loss_of(model, prompts, 1), loss_of(model, prompts, 1))
    loss_of(model, prompts, 1).backward()


def test_attention_dropout_has_one_mask_for_rows_and_heads() -> None:
    attention = Attention(small_config(attention_dropout=0.5), "encoder").train()
    row = torch.randn(1, 8, 32)
    torch.manual_seed(0)
    out = attention(row.expand(3, -1, -1))
    torch.testing.assert_close(out[0], out[1])
    torch.testing.assert_close(out[0], out[2])


def test_checkpointed_layers_give_the_same_gradients_with_dropout(prompts: dict) -> None:
    model = small_model(dropout=0.1).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    loss_of(model, prompts).backward()
    loss_of(twin, prompts).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_padding_does_not_reach_the_logits(prompts: dict) -> None:
    model = small_model()
    noisy = prompts["input_ids"].clone()
    noisy[prompts["attention_mask"] == 0] = 33
    labels = torch.arange(27).view(3, 9) % 24
    a = model(input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], labels=labels).logits
    b = model(input_ids=noisy, attention_mask=prompts["attention_mask"], labels=labels).logits
    torch.testing.assert_close(a, b)


def test_sinkhorn_is_doubly_stochastic_and_its_gradient_finite() -> None:
    scores = torch.randn(2, 3, 6, 6, requires_grad=True)
    weights = sinkhorn(scores, None, 40)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6), atol=1e-4, rtol=0)
    torch.testing.assert_close(weights.sum(-2), torch.ones(2, 3, 6), atol=1e-4, rtol=0)
    hidden = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    hidden[0, ..., 4:] = True
    weights = sinkhorn(scores, hidden, 5)
    assert not weights[0, ..., 4:].any()
    (weights**2).sum().backward()
    assert scores.grad.isfinite().all()


def test_smelu_between_its_ends() -> None:
    x = torch.tensor([-1.0 + 1e-6, 0.0, 1.0, 2.0])
    torch.testing.assert_close(SmeLU()(x), torch.tensor([0.0, 0.25, 1.0, 2.0]), atol=1e-6, rtol=0)


def test_too_many_tokens_are_refused_with_both_numbers(model) -> None:
    with pytest.raises(ValueError, match=r"9 tokens.*max_text_length=8"):
        model(input_ids=torch.ones(1, 9, dtype=torch.long), labels=torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"position 10.*image_length=9"):
        model(input_ids=torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="decoder_input_ids or labels"):
        model(input_ids=torch.ones(1, 8, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ln_positions": "middle"}, "ln_positions='middle' is not one of normformer"),
        ({"activation_function": "sin"}, "activation_function='sin'"),
        ({"d_model": 30}, "d_model=30 is not divisible by encoder_attention_heads=4"),
        ({"use_alibi": True}, "use_alibi"),
        ({"use_scan": True, "ln_positions": "swinv2"}, "use_scan to false"),
        ({"dropout": 1.0, "image_length": 0}, r"image_length=0.*dropout=1.0"),
    ],
)
def test_impossible_configurations_name_every_offender(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**options)
    with pytest.raises(ValueError, match="ch=33"):
        VQGANConfig(ch=33)


def test_configuration_survives_saving(tmp_path) -> None:
    config = small_config(ln_positions="deepnet", use_deepnet_scaling=True)
    config.save_pretrained(tmp_path)
    assert DalleBartConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_new", "swish", "silu", "tanh", "smelu"])
@pytest.mark.parametrize("glu", [True, False])
def test_activations_of_transformers(name: str, glu: bool, prompts: dict) -> None:
    assert name == "smelu" or name in ACT2FN
    assert loss_of(small_model(activation_function=name, use_glu=glu), prompts).isfinite()
