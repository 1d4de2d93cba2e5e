"""Settings that change while an optimizer runs, and what it counts."""

from dataclasses import replace

import pytest
import torch

from dalle_torch.config import OptimizerConfig, ShampooConfig
from dalle_torch.optim.adjust import adjust, counters
from dalle_torch.optim.build import build_optimizer
from tests.unit.optim.test_build import Network


@pytest.mark.parametrize("name", ["adamw", "adafactor", "shampoo"])
def test_what_is_adjusted_is_what_an_optimizer_made_so_would_have(name: str) -> None:
    before = OptimizerConfig(name=name, weight_decay=0.1)
    after = replace(before, weight_decay=0.2)
    if name != "adafactor":
        after = replace(after, beta1=0.5, beta2=0.9)
    if name == "shampoo":
        after = replace(after, shampoo=ShampooConfig(preconditioning_compute_steps=7, statistics_compute_steps=2))
    model = Network()
    optimizer, wanted = build_optimizer(model, before), build_optimizer(model, after)
    assert adjust(optimizer, after)
    for group, expected in zip(optimizer.param_groups, wanted.param_groups, strict=True):
        # When Shampoo starts to precondition follows from the interval where it is not set; it stays as it was.
        names = [key for key in expected if key not in ("params", "start_preconditioning_step")]
        assert {key: group[key] for key in names} == {key: expected[key] for key in names}


@pytest.mark.parametrize("name", ["adamw", "shampoo"])
def test_decay_cannot_come_into_a_group_of_all(name: str) -> None:
    config = OptimizerConfig(name=name)
    optimizer = build_optimizer(Network(), config)
    before = [dict(group) for group in optimizer.param_groups]
    assert not adjust(optimizer, replace(config, weight_decay=0.1, beta1=0.5))
    assert [dict(group) for group in optimizer.param_groups] == before
    assert adjust(optimizer, replace(config, beta1=0.5))
    # Where there are two groups it can go and come back.
    optimizer = build_optimizer(Network(), config, split_decay=True)
    assert adjust(optimizer, replace(config, weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert adjust(optimizer, config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_shampoos_counts_are_summed() -> None:
    model = Network()
    optimizer = build_optimizer(model, OptimizerConfig(name="shampoo"))
    assert counters(optimizer) == {"root_failures": 0.0, "nonfinite_gradients": 0.0}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan) if parameter.ndim > 1 else torch.ones_like(parameter)
    optimizer.step()
    # The matrices that are trained: embeddings and a layer's.
    assert counters(optimizer)["nonfinite_gradients"] == 2.0
    assert counters(build_optimizer(model, OptimizerConfig())) == {}
