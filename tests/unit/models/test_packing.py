"""Weights packed for drawing give the products they gave before."""

import copy

import pytest
import torch
from torch import nn

from dalle_torch.models.packing import BlockedLinear, Int8Linear, can_pack, pack_for_drawing
from tests.unit.models.conftest import small_model


@pytest.mark.parametrize("shape", [(40, 32), (33, 27), (2730, 64), (64, 2730), (1, 1)])
@pytest.mark.parametrize("rows", [1, 2, 8, 19])
def test_blocked_products_are_equal(shape: tuple[int, int], rows: int) -> None:
    linear = nn.Linear(shape[1], shape[0])
    x = torch.randn(3, rows, shape[1])
    # Another order of float32 sums.
    torch.testing.assert_close(BlockedLinear(linear)(x), linear(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 32), (33, 27), (2730, 64), (64, 2730), (1, 1)])
@pytest.mark.parametrize("rows", [1, 2, 8, 19])
def test_int8_products_are_those_of_the_rounded_weights(shape: tuple[int, int], rows: int) -> None:
    linear = nn.Linear(shape[1], shape[0])
    packed = Int8Linear(linear)
    scales = linear.weight.abs().amax(1, keepdim=True) / 127
    rounded = (linear.weight / scales).round() * scales
    # The range of a row is exact, so no weight is off by more than half a step.
    assert ((rounded - linear.weight).abs() <= scales * 0.5001).all()
    x = torch.randn(3, rows, shape[1]).bfloat16().float()
    expected = x @ rounded.T + linear.bias
    # The kernel gives bfloat16 (8 bits) of sums whose terms may cancel.
    error = (packed(x) - expected).abs().max()
    assert error <= 2**-8 * (x.abs() @ rounded.abs().T).max()


@pytest.mark.parametrize("options", [{}, {"use_bias": True, "use_glu": False}, {"use_head_scale": True}])
def test_a_packed_model_draws_the_same_picture(options: dict, prompts: dict) -> None:
    model = small_model(**options)
    drawn = model.generate(**prompts, do_sample=False)
    packed = pack_for_drawing(copy.deepcopy(model))
    assert torch.equal(packed.generate(**prompts, do_sample=False), drawn)
    kinds = {type(module) for module in packed.decoder.modules()}
    assert BlockedLinear in kinds
    # What runs once a prompt and the encoder keep their plain layers.
    assert isinstance(packed.decoder.layers[0].cross_attn.k_proj, nn.Linear)
    assert isinstance(packed.encoder.layers[0].self_attn.q_proj, nn.Linear)


def test_a_packed_model_says_what_it_cannot_do(prompts: dict) -> None:
    packed = pack_for_drawing(small_model(), "int8")
    assert not can_pack(packed)
    assert packed.generate(**prompts).shape == (3, 10)
    with pytest.raises(ValueError, match="once"):
        pack_for_drawing(packed)
    with pytest.raises(ValueError, match="no weights to save"):
        packed.state_dict()
    with pytest.raises(ValueError, match="cannot become torch.float16"):
        packed.half()
    packed = pack_for_drawing(small_model())
    assert packed.to("cpu").float() is packed
    with pytest.raises(ValueError, match="quantize='int4'"):
        pack_for_drawing(small_model(), "int4")
    with pytest.raises(ValueError, match="only a float32 model"):
        pack_for_drawing(small_model().bfloat16())
