"""A root that fails or a gradient that is not a number is counted, and does no harm."""

import pytest
import torch

from dalle_torch.optim.shampoo import preconditioner
from tests.unit.optim.conftest import give_gradients, train, values


def test_a_failed_root_keeps_the_old_preconditioner_and_is_counted(make, monkeypatch) -> None:
    named, optimizer = make()
    train(named, optimizer, range(3))
    state = optimizer.state[named["a"]]
    old = {name: tensor.clone() for name, tensor in state.items() if name.startswith("preconditioners")}
    inverse_roots = preconditioner.inverse_roots

    def failing(matrices, problem, method):
        roots, failed = inverse_roots(matrices, problem, method)
        return torch.full_like(roots, 7.0), torch.ones_like(failed)

    monkeypatch.setattr(preconditioner, "inverse_roots", failing)
    train(named, optimizer, range(3, 5))
    for name, tensor in old.items():
        assert torch.equal(state[name], tensor)
    # [8, 6] in blocks of 4: four blocks of two matrices; a vector of 6, two blocks; a scalar none.
    assert int(state["root_failures"]) == 8
    assert int(optimizer.state[named["bias"]]["root_failures"]) == 2
    assert int(optimizer.state[named["scalar"]]["root_failures"]) == 0
    monkeypatch.undo()
    train(named, optimizer, range(5, 7))
    assert int(state["root_failures"]) == 8
    assert not torch.equal(state["preconditioners.0.0"], old["preconditioners.0.0"])


@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_statistics_that_are_not_finite_fail_alone(make, method) -> None:
    # With the usual ridge Newton fails by itself now and then, on statistics of so few gradients.
    named, optimizer = make(root_method=method, matrix_epsilon=1e-3)
    healthy, other = make(root_method=method, matrix_epsilon=1e-3)
    train(named, optimizer, range(3))
    train(healthy, other, range(3))
    optimizer.state[named["a"]]["statistics.0.0"][0, 0, 0] = float("nan")
    train(named, optimizer, range(3, 6))
    train(healthy, other, range(3, 6))
    assert int(optimizer.state[named["a"]]["root_failures"]) == 1
    assert int(optimizer.state[named["b"]]["root_failures"]) == 0
    assert torch.equal(named["b"], healthy["b"])
    assert named["a"].isfinite().all()


@pytest.mark.parametrize("graft", ["sgd", "sqrt_n", "rmsprop", "rmsprop_normalized", "adagrad", "adagrad_normalized"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_as_zero(make, graft, bad) -> None:
    named, optimizer = make(graft_type=graft)
    zeroed, other = make(graft_type=graft)
    for step in range(6):
        for chosen in (named, zeroed):
            give_gradients(chosen.values(), step)
        if step == 2:
            for name in ("a", "wide", "scalar"):
                named[name].grad.view(-1)[0] = bad
                zeroed[name].grad.zero_()
        optimizer.step()
        other.step()
    assert torch.equal(values(named), values(zeroed))
    for name, parameter in named.items():
        state = optimizer.state[parameter]
        assert int(state["nonfinite_gradients"]) == (name in ("a", "wide", "scalar"))
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_a_gradient_whose_square_overflows_counts_as_zero(make) -> None:
    named, optimizer = make()
    give_gradients(named.values(), 0)
    # Finite, but no float32 holds the square that the statistics would take in.
    named["a"].grad[0, 0] = 1e25
    before = named["a"].detach().clone()
    optimizer.step()
    assert torch.equal(named["a"], before)
    assert int(optimizer.state[named["a"]]["nonfinite_gradients"]) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in optimizer.state[named["a"]].values())


def test_such_gradients_come_through_when_asked(make) -> None:
    named, optimizer = make(skip_nonfinite_gradients=False)
    give_gradients(named.values(), 0)
    named["a"].grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.state[named["a"]]["statistics.0.0"].isnan().any()
    assert int(optimizer.state[named["a"]]["nonfinite_gradients"]) == 0
    assert named["b"].isfinite().all()


def test_gradients_of_zero_are_no_trouble(make) -> None:
    named, optimizer = make()
    for _ in range(6):
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    before = values(make()[0])
    assert torch.equal(values(named), before)
