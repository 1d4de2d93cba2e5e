"""A run that stops and goes on is the run that never stopped, bit for bit; what does not fit is refused."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dalle_torch.optim import DistributedShampoo
from tests.unit.optim.conftest import SETTINGS, parameters, train, values


def through_a_file(state: dict[str, Any], path) -> dict[str, Any]:
    """The state as safetensors leaves it."""
    flat = {f"{name}/{kind}": tensor for name, of_name in state["state"].items() for kind, tensor in of_name.items()}
    save_file(flat, path)
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, kind = key.split("/")
        states.setdefault(name, {})[kind] = tensor
    return {"state": states, "param_groups": copy.deepcopy(state["param_groups"])}


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 7), st.booleans(), st.sampled_from(["newton", "eigh"]), st.sampled_from(["sgd", "rmsprop"]))
def test_saving_at_any_step_continues_bit_for_bit(tmp_path, stop: int, int8: bool, method: str, graft: str) -> None:
    changes = {"best_effort_memory_usage_reduction": int8, "root_method": method, "graft_type": graft}
    straight, first = parameters(), parameters()
    train(straight, whole := DistributedShampoo(straight.items(), **SETTINGS | changes), range(8))
    half = DistributedShampoo(first.items(), **SETTINGS | changes)
    train(first, half, range(stop))
    state = through_a_file(half.state_dict(), tmp_path / "state.safetensors")
    second = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    resumed = DistributedShampoo(second.items(), **SETTINGS | changes)
    resumed.load_state_dict(state)
    train(second, resumed, range(stop, 8))
    assert torch.equal(values(straight), values(second))
    for name in straight:
        expected, found = whole.state[straight[name]], resumed.state[second[name]]
        assert expected.keys() == found.keys()
        for kind in expected:
            assert torch.equal(expected[kind], found[kind]), (name, kind)


def test_the_state_dict_is_named_and_plain(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    state = optimizer.state_dict()
    assert state["state"].keys() == named.keys()
    assert state["param_groups"][0]["params"] == list(named)
    assert set(state["state"]["odd"]) == {
        "step", "momentum", "diagonal_momentum", "diagonal_statistics", "root_failures", "nonfinite_gradients",
        *(f"{kind}.{r}.{dim}" for kind in ("statistics", "preconditioners") for r in range(4) for dim in (0, 1)),
    }  # fmt: skip
    assert set(state["state"]["wide"]) == {
        "step", "momentum", "diagonal_statistics", "root_failures", "nonfinite_gradients"
    }  # fmt: skip


def test_parameters_without_names_go_by_position() -> None:
    first = list(parameters().values())
    optimizer = DistributedShampoo(first, **SETTINGS)
    train(dict(enumerate(first)), optimizer, range(2))
    state = optimizer.state_dict()
    assert list(state["param_groups"][0]["params"]) == list(range(len(first)))
    again = DistributedShampoo(first, **SETTINGS)
    again.load_state_dict(copy.deepcopy(state))
    assert torch.equal(again.state[first[0]]["momentum"], optimizer.state[first[0]]["momentum"])


def test_loading_copies(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    other_named, other = make()
    other.load_state_dict(optimizer.state_dict())
    train(other_named, other, range(2, 3))
    assert int(optimizer.state[named["a"]]["step"]) == 2


def test_parameters_may_be_regrouped_and_reordered(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(5))
    state = copy.deepcopy(optimizer.state_dict())
    other = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    groups = [{"params": [(n, other[n]) for n in ("b", "odd", "wide", "bias")], "lr": 0.5},
              {"params": [(n, other[n]) for n in ("one", "a", "kernel", "scalar")], "lr": 0.25}]  # fmt: skip
    regrouped = DistributedShampoo(groups, **SETTINGS)
    regrouped.load_state_dict(state)
    assert [group["lr"] for group in regrouped.param_groups] == [0.5, 0.25]
    for name in named:
        for kind, tensor in optimizer.state[named[name]].items():
            assert torch.equal(regrouped.state[other[name]][kind], tensor)


def test_rate_and_schedule_come_along(make) -> None:
    named, optimizer = make(lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(named, optimizer, range(1))
    schedule.step()
    other_named, other = make(lr=0.7)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == pytest.approx(0.05)
    resumed = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)
    resumed.load_state_dict(schedule.state_dict())
    train(other_named, other, range(1))
    resumed.step()
    assert other.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 3}, ["block_size is 4 in it and 3 here"]),
        ({"merge_small_dims_block_size": 64, "matrix_epsilon": 1e-3},
         ["merge_small_dims_block_size is 8 in it and 64 here", "matrix_epsilon is 1e-06 in it and 0.001 here"]),
        ({"graft_type": "sgd"}, ["graft_type is 'rmsprop_normalized' in it and 'sgd' here"]),
        ({"best_effort_memory_usage_reduction": True}, ["is False in it and True here"]),
        ({"skip_preconditioning_dim_size_gt": 5}, ["skip_preconditioning_dim_size_gt is 12 in it and 5 here"]),
    ],
)  # fmt: skip
def test_other_settings_are_refused_with_both_values(make, changes, words) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    other_named, other = make(**changes)
    train(other_named, other, range(1))
    before = values(other_named)
    with pytest.raises(ValueError, match="does not fit this optimizer") as caught:
        other.load_state_dict(optimizer.state_dict())
    assert all(word in str(caught.value) for word in words)
    assert torch.equal(values(other_named), before)
    assert int(other.state[other_named["a"]]["step"]) == 1


def test_other_parameters_are_refused_all_at_once(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    others = parameters()
    del others["odd"]
    others["new"] = nn.Parameter(torch.zeros(2))
    others["a"] = nn.Parameter(torch.zeros(8, 7))
    with pytest.raises(ValueError, match="does not fit") as caught:
        DistributedShampoo(others.items(), **SETTINGS).load_state_dict(optimizer.state_dict())
    message = str(caught.value)
    assert "odd: in the saved state, not in this optimizer" in message
    assert "new: not in the saved state" in message
    assert "a/momentum: shape [8, 6] in it, [8, 7] here" in message


def test_clocks_that_differ_are_kept_apart(make) -> None:
    named, optimizer = make()
    for step in range(5):
        for name, parameter in named.items():
            parameter.grad = torch.ones_like(parameter) if name != "b" or step >= 2 else None
        optimizer.step()
    other = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    resumed = DistributedShampoo(other.items(), **SETTINGS)
    resumed.load_state_dict(optimizer.state_dict())
    train(named, optimizer, range(5, 8))
    train(other, resumed, range(5, 8))
    assert int(resumed.state[other["b"]]["step"]) == 6
    assert torch.equal(values(named), values(other))


def test_hooks_on_the_state_are_called_as_torch_calls_them(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("saving", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append(("saved", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: state | {"note": 1})
    state = optimizer.state_dict()
    assert seen == [("saving", optimizer), ("saved", optimizer)] and state["note"] == 1

    _, other = make()
    other.register_load_state_dict_pre_hook(lambda o, state: seen.append(("loading", state["note"])))
    other.register_load_state_dict_pre_hook(lambda o, state: {**state["wrapped"]})
    other.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o.param_groups[0]["lr"])))
    optimizer.param_groups[0]["lr"] = 0.125
    wrapped = {"wrapped": {**optimizer.state_dict()}, "note": 2}
    seen.clear()
    other.load_state_dict(wrapped)
    assert seen == [("loading", 2), ("loaded", 0.125)]
    assert set(wrapped) == {"wrapped", "note"}


@pytest.mark.parametrize(
    ("kind", "dtype", "words"),
    [
        ("momentum", torch.int8, "a/momentum: torch.int8 in it, torch.float32 here"),
        ("statistics.0.0", torch.float64, "a/statistics.0.0: torch.float64 in it, torch.float32 here"),
        ("momentum", torch.complex64, "a/momentum: torch.complex64 in it, torch.float32 here"),
        ("step", torch.float32, "a/step: torch.float32 in it, torch.int64 here"),
    ],
)
def test_values_of_another_kind_are_refused(make, kind, dtype, words) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"]["a"][kind] = state["state"]["a"][kind].to(dtype)
    _, other = make()
    with pytest.raises(ValueError, match="does not fit this optimizer") as caught:
        other.load_state_dict(state)
    assert words in str(caught.value)
    assert not other.state


def test_momenta_in_8_bits_do_not_take_others(make) -> None:
    named, optimizer = make(best_effort_memory_usage_reduction=True)
    train(named, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"]["a"]["momentum"] = state["state"]["a"]["momentum"].float()
    _, other = make(best_effort_memory_usage_reduction=True)
    with pytest.raises(ValueError, match=r"a/momentum: torch.float32 in it, torch.int8 here"):
        other.load_state_dict(state)


def test_narrower_values_are_converted_exactly(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    of_a = state["state"]["a"]
    of_a |= {"momentum": of_a["momentum"].bfloat16(), "step": of_a["step"].int()}
    others, other = make()
    other.load_state_dict(state)
    found = other.state[others["a"]]
    assert found["momentum"].dtype == torch.float32 and torch.equal(found["momentum"], of_a["momentum"].float())
    assert found["step"].dtype == torch.int64 and int(found["step"]) == 2


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"state": {}}, "no param_groups, but state: give what state_dict"),
        ({}, "no state and no param_groups, but nothing"),
        ({"state": {}, "param_groups": [{"lr": 1.0}]}, "does not say which params"),
    ],
)
def test_what_is_no_state_is_refused(make, state, words) -> None:
    _, optimizer = make()
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
