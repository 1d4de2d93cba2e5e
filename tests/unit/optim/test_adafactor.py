"""Adafactor without numbers from the device is torch's Adafactor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dalle_torch.optim.adafactor import Adafactor
from dalle_torch.optim.build import prepare
from dalle_torch.optim.saving import describe, load_state, misfits, state_tensors

SHAPES = [(), (5,), (1, 1), (4, 6), (6, 1), (2, 3, 4)]


def parameters(scale: float) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return [(f"p{index}", nn.Parameter(scale * torch.randn(shape))) for index, shape in enumerate(SHAPES)]


def give_gradients(named: list[tuple[str, nn.Parameter]], step: int, size: float) -> None:
    generator = torch.Generator().manual_seed(step)
    for _, parameter in named:
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


@settings(deadline=None, max_examples=25)
@given(
    scale=st.sampled_from([0.0, 1e-4, 1.0, 30.0]),
    size=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e4]),
    rates=st.lists(st.sampled_from([0.0, 1e-3, 0.1, 2.0]), min_size=1, max_size=5),
    decay=st.sampled_from([0.0, 0.1]),
    power=st.sampled_from([-0.8, -0.5, 0.0]),
    threshold=st.sampled_from([1.0, 2.5]),
)
def test_updates_are_torchs(
    scale: float, size: float, rates: list[float], decay: float, power: float, threshold: float
) -> None:
    mine, theirs = parameters(scale), parameters(scale)
    options = {"weight_decay": decay, "beta2_decay": power, "d": threshold}
    ours, reference = Adafactor(mine, lr=0.0, **options), torch.optim.Adafactor(theirs, lr=0.0, **options)
    for step, rate in enumerate(rates):
        give_gradients(mine, step, size)
        give_gradients(theirs, step, size)
        ours.param_groups[0]["lr"] = torch.tensor(rate)
        reference.param_groups[0]["lr"] = rate
        ours.step()
        reference.step()
    found, wanted = state_tensors(ours), state_tensors(reference)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        # Sums and products in another order; moments below the least that counts are noise.
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-30)
    for (name, one), (_, other), (_, start) in zip(mine, theirs, parameters(scale), strict=True):
        # What is subtracted can be as large as what it is subtracted from.
        largest = max(value.abs().max().item() for value in (one, start))
        assert (one - other).abs().max().item() <= 1e-5 * largest, name


def test_its_state_goes_over_to_torchs_class_and_back() -> None:
    mine, theirs = parameters(1.0), parameters(1.0)
    ours, reference = Adafactor(mine, lr=0.1), torch.optim.Adafactor(theirs, lr=0.1)
    prepare(ours)
    assert all(value.count_nonzero() == 0 for value in state_tensors(ours).values())
    give_gradients(mine, 0, 1.0)
    ours.step()
    assert not misfits(reference, describe(ours)) and not misfits(ours, describe(reference))
    load_state(reference, state_tensors(ours), describe(ours))
    again = Adafactor(mine, lr=0.1)
    load_state(again, state_tensors(reference), describe(reference))
    for key, value in state_tensors(ours).items():
        assert torch.equal(state_tensors(again)[key], value) and torch.equal(state_tensors(reference)[key], value)
    assert state_tensors(again)["p0/step"] == 1


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure is not taken"):
        Adafactor(parameters(1.0), lr=0.1).step(lambda: 0.0)
