"""The state of every optimizer, flat and by name: its shapes are known beforehand, and it goes on where it stopped."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dalle_torch.config import OptimizerConfig, ShampooConfig
from dalle_torch.optim.build import build_optimizer
from dalle_torch.optim.saving import describe, expected_shapes, load_state, misfits, state_tensors
from tests.unit.optim.conftest import parameters, train, values

SHAMPOO = ShampooConfig(
    block_size=4,
    merge_small_dims_block_size=8,
    skip_preconditioning_dim_size_gt=12,
    start_preconditioning_step=2,
    preconditioning_compute_steps=2,
)
CONFIGS = {
    "adamw": OptimizerConfig(weight_decay=0.1),
    "adafactor": OptimizerConfig(name="adafactor", weight_decay=0.1),
    "shampoo": OptimizerConfig(name="shampoo", shampoo=SHAMPOO, weight_decay=0.1),
}


def _start(name: str) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    model = nn.ParameterDict(parameters())
    return dict(model.named_parameters()), build_optimizer(model, CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_known_before_there_is_a_state(name: str) -> None:
    named, optimizer = _start(name)
    expected = expected_shapes(optimizer)
    assert state_tensors(optimizer) == {}
    train(named, optimizer, range(3))
    assert {key: tensor.shape for key, tensor in state_tensors(optimizer).items()} == expected
    assert {key.rpartition("/")[0] for key in expected} == named.keys()


@pytest.mark.parametrize("name", CONFIGS)
@settings(deadline=None)
@given(stop=st.integers(0, 7))
def test_a_state_that_is_taken_over_goes_on_bit_for_bit(name: str, stop: int) -> None:
    whole, optimizer = _start(name)
    train(whole, optimizer, range(8))
    first, halted = _start(name)
    train(first, halted, range(stop))
    description = json.loads(json.dumps(describe(halted), allow_nan=False))
    tensors = {key: tensor.clone() for key, tensor in state_tensors(halted).items()}
    second, resumed = _start(name)
    with torch.no_grad():
        for key, parameter in second.items():
            parameter.copy_(first[key])
    assert misfits(resumed, description, {}) == []
    load_state(resumed, tensors, description)
    train(second, resumed, range(stop, 8))
    assert torch.equal(values(second), values(whole))


def test_only_what_shampoos_matrices_depend_on_has_to_agree() -> None:
    _, optimizer = _start("shampoo")
    description = describe(optimizer)
    for group in optimizer.param_groups:
        group |= {"lr": 7.0, "weight_decay": 0.5, "root_method": "newton", "beta1": 0.5, "beta2": 0.5}
        group |= {"preconditioning_compute_steps": 7, "statistics_compute_steps": 3}
    assert misfits(optimizer, description, {}) == []
    for group in optimizer.param_groups:
        group["matrix_epsilon"] = 0.5
    assert misfits(optimizer, description, {}) == ["optimizer matrix_epsilon is 1e-06 in it and 0.5 here"]
    assert misfits(_start("adamw")[1], description, {}) == ["the optimizer is DistributedShampoo in it and AdamW here"]
