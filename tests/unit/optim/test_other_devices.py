"""A step on another device than the host's, as far as that can be seen without one.

On torch's meta device tensors have no values, and whoever reads one fails.
"""

from typing import Any

import pytest
import torch
from torch import nn

from dalle_torch.optim import DistributedShampoo
from dalle_torch.optim.shampoo import bucket, preconditioner
from tests.unit.optim.conftest import SETTINGS, parameters, train, values

SHAPES = [(8, 6), (8, 6), (5, 7), (3, 20), (6,), (), (4, 3, 3, 3), (30,)]


@pytest.mark.parametrize(
    ("settings", "rate", "limit"),
    [
        ({}, 0.01, 1 << 20),
        ({"best_effort_memory_usage_reduction": True, "weight_decay": 0.1, "nesterov": True}, torch.tensor(0.01), 64),
        ({"clip_by_scaled_gradient_norm": 1.0, "graft_type": "rmsprop"}, torch.ones((), device="meta"), 1 << 20),
        ({"decoupled_weight_decay": True, "weight_decay": 0.1, "exponent_override": 1}, 0.01, 64),
    ],
)
def test_a_step_reads_nothing_from_the_device(monkeypatch, settings: dict[str, Any], rate: Any, limit: int) -> None:
    # Taken in runs and batches, as on a GPU.
    monkeypatch.setitem(bucket._RUN_ELEMENTS, "meta", limit)
    monkeypatch.setitem(preconditioner._ROOT_ELEMENTS, "meta", limit)
    there = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = DistributedShampoo(there, **SETTINGS | {"lr": rate} | settings)
    for step in range(4):
        for index, parameter in enumerate(there):
            parameter.grad = torch.empty_like(parameter) if (index + step) % 4 else None
        optimizer.step()
    for parameter in there:
        devices = {name: tensor.device.type for name, tensor in optimizer.state[parameter].items()}
        # The clock is the host's.
        assert devices.pop("step") == "cpu"
        assert set(devices.values()) == {"meta"}


@pytest.mark.parametrize("changes", [{}, {"preconditioning_compute_steps": 3}])
def test_roots_without_a_look_at_them_are_those_with_one(make, monkeypatch, changes: dict[str, Any]) -> None:
    """A fixed number of rounds, as on devices that the host should not wait for."""
    problem = preconditioner.RootProblem
    # Without the ridge's usual size rounding decides how far Newton gets on statistics of so few gradients.
    settings = {"root_method": "newton", "matrix_epsilon": 1e-3} | changes
    named, optimizer = make(**settings)
    train(named, optimizer, range(6))
    others, static = make(**settings)
    monkeypatch.setattr(preconditioner, "RootProblem", lambda **of_it: problem(**of_it | {"static": True}))
    train(others, static, range(6))
    assert not torch.equal(values(others), values(named))
    moved = (values(named) - values(parameters())).norm()
    # They stop at other errors, all below 1e-6, and see the ridge's eigenvalue through other iterations.
    assert (values(others) - values(named)).norm() < 1e-3 * moved
