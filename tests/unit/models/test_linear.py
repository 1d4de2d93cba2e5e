"""The dense layer gives torch's products and gradients, whoever computes them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dalle_torch.models import linear as module
from dalle_torch.models.linear import Linear
from dalle_torch.products import available
from tests.unit.models.conftest import small_model

on_x86 = pytest.mark.skipif(not available(), reason="torch has no oneDNN product for this processor")
SUMS = {"atol": 3e-4, "rtol": 1e-4}
"""Another order of float32 sums of some thousand numbers near 1 at most."""


def gradients(layer: nn.Linear, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad((y * weights).sum(), (x, *layer.parameters()))


@given(
    rows=st.integers(64, 600), inputs=st.integers(1, 70), outputs=st.integers(1, 70) | st.just(4200),
    bias=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_products_and_gradients_are_those_of_torch(rows: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = Linear(inputs, outputs, bias=bias)
    torchs = nn.Linear(inputs, outputs, bias=bias)
    torchs.load_state_dict(ours.state_dict())
    x, weights = (torch.randn(1, rows, n, generator=generator) for n in (inputs, outputs))
    for found, expected in zip(gradients(ours, x, weights), gradients(torchs, x, weights), strict=True):
        torch.testing.assert_close(found, expected, **SUMS)
        assert found.is_contiguous()


@on_x86
def test_many_rows_are_onednns_and_the_switch_is_torchs() -> None:
    layer, x = Linear(8, 8, bias=False), torch.randn(4, 64, 8)
    ((product, _),) = layer(x).grad_fn.next_functions
    assert type(product).__name__ == "_ProductBackward"
    with torch.backends.mkldnn.flags(enabled=False):
        assert not module._pays(x, layer.weight)
    assert not module._pays(x[0, :63], layer.weight)
    assert not module._pays(x.double(), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@on_x86
def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer, x = Linear(8, 24), torch.randn(64, 8, requires_grad=True)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(64, 8), **SUMS)
    layer.requires_grad_(True)
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(24, 8), **SUMS)


@on_x86
def test_gradients_of_gradients() -> None:
    x, weight = torch.randn(64, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    found = [
        torch.autograd.grad(torch.autograd.grad(product(x, weight).pow(3).sum(), x, create_graph=True)[0].sum(), weight)
        for product in (module._Product.apply, lambda a, b: a @ b.T)
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-4)


@on_x86
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample() -> None:
    layer, x = Linear(6, 5), torch.randn(3, 64, 6)

    def loss(weights: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, (sample,)).square().sum()

    weights = dict(layer.named_parameters())
    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for index, sample in enumerate(x):
        layer.zero_grad()
        loss(weights, sample).backward()
        torch.testing.assert_close(together["weight"][index], layer.weight.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_glu": True, "use_bias": True}])
def test_a_model_trains_as_with_torchs_products(options: dict) -> None:
    model = small_model(**options).train()
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    shape = (16, model.config.image_length)
    labels = torch.randint(model.config.image_vocab_size, shape, generator=generator)
    ids = torch.randint(model.config.encoder_vocab_size, (16, model.config.max_text_length), generator=generator)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    with torch.backends.mkldnn.flags(enabled=False):
        expected = twin(input_ids=ids, labels=labels).loss
        expected.backward()
    torch.testing.assert_close(loss, expected)
    largest = max(parameter.grad.abs().max().item() for parameter in twin.parameters())
    for (name, found), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Rounding of float32 through the layers; the gradient of a bias of keys is nothing else.
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5 * largest, rtol=1e-3, msg=name)
