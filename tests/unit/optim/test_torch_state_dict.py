"""The helpers of `torch.distributed.checkpoint.state_dict` on one process: what they get they set, bit for bit."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from dalle_torch.optim import DistributedShampoo
from tests.unit.optim.conftest import SETTINGS

OPTIONS = {
    "plain": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "offloaded": StateDictOptions(full_state_dict=True, cpu_offload=True),
}

_SAME = ((True, True), (False, False))


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def optimizer_of(module: nn.Module, names: bool, groups: int = 1) -> DistributedShampoo:
    found: list[Any] = list(module.named_parameters() if names else module.parameters())
    parts = [{"params": found[:3]}, {"params": found[3:], "weight_decay": 0.1}] if groups > 1 else found
    return DistributedShampoo(parts, **SETTINGS)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(inputs).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("saving", "loading", "options"),
    [
        *((saving, loading, options) for saving, loading in _SAME for options in OPTIONS),
        # In the full form torch stumbles over names that only the saved groups have, whatever the optimizer.
        (True, False, "plain"),
        *((False, True, options) for options in OPTIONS),
    ],
)
def test_a_run_goes_on_bit_for_bit(options: str, groups: int, saving: bool, loading: bool) -> None:
    whole = model()
    optimizer = optimizer_of(whole, saving, groups)
    train(whole, optimizer, range(5))
    optimizer.param_groups[0]["lr"] = 0.03
    of_model, of_optimizer = copy.deepcopy(get_state_dict(whole, optimizer, options=OPTIONS[options]))
    train(whole, optimizer, range(5, 9))
    other = model(1)
    resumed = optimizer_of(other, loading, groups)
    set_state_dict(other, resumed, model_state_dict=of_model, optim_state_dict=of_optimizer, options=OPTIONS[options])
    assert resumed.param_groups[0]["lr"] == 0.03
    train(other, resumed, range(5, 9))
    assert same(whole, other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("names", [True, False])
def test_it_goes_by_name_in_the_flat_form_too(tmp_path, names: bool) -> None:
    whole = model()
    optimizer = optimizer_of(whole, names)
    train(whole, optimizer, range(5))
    state = get_optimizer_state_dict(whole, optimizer)
    assert set(state["state"]) == set(dict(whole.named_parameters()))
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    dcp.save(get_optimizer_state_dict(whole, optimizer, options=flat), checkpoint_id=tmp_path, no_dist=True)
    other = model()
    other.load_state_dict(whole.state_dict())
    train(whole, optimizer, range(5, 9))
    resumed = optimizer_of(other, names)
    resumed.prepare()
    target = get_optimizer_state_dict(other, resumed, options=flat)
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, resumed, target, options=flat)
    train(other, resumed, range(5, 9))
    assert same(whole, other)


def test_parameters_are_found_by_name_in_another_order() -> None:
    whole = model()
    optimizer = optimizer_of(whole, names=True)
    train(whole, optimizer, range(5))
    state = copy.deepcopy(get_optimizer_state_dict(whole, optimizer))
    other = model()
    backwards = DistributedShampoo(reversed(list(other.named_parameters())), **SETTINGS)
    set_optimizer_state_dict(other, backwards, state)
    for name, parameter in whole.named_parameters():
        for kind, tensor in optimizer.state[parameter].items():
            assert torch.equal(backwards.state[other.get_parameter(name)][kind], tensor), (name, kind)


def test_prepared_state_is_not_stepped_to_be_got() -> None:
    fresh = model()
    optimizer = optimizer_of(fresh, names=True)
    optimizer.prepare()
    state = get_optimizer_state_dict(fresh, optimizer)
    assert {int(of_one["step"]) for of_one in state["state"].values()} == {0}


def test_a_state_dict_is_loaded_with_weights_only(tmp_path) -> None:
    whole = model()
    optimizer = optimizer_of(whole, names=True)
    train(whole, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = model()
    other.load_state_dict(whole.state_dict())
    resumed = optimizer_of(other, names=True)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(whole, optimizer, range(5, 9))
    train(other, resumed, range(5, 9))
    assert same(whole, other)


def test_groups_of_other_sizes_are_refused() -> None:
    whole = model()
    optimizer = optimizer_of(whole, names=False, groups=2)
    train(whole, optimizer, range(1))
    with pytest.raises(ValueError, match=r"0.weight: not in the saved state"):
        optimizer_of(model(), names=True).load_state_dict(optimizer.state_dict())
