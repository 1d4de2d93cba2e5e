"""Schedulers of torch as they are, and settings that change between steps."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler

from dalle_torch.optim import DistributedShampoo
from tests.unit.optim.conftest import SETTINGS, give_gradients, parameters, train, values


def test_schedulers_drive_the_rate_and_a_rate_may_be_a_tensor(make) -> None:
    numbers, first = make(lr=0.02)
    rate = torch.tensor(0.02)
    tensors, second = make(lr=rate)
    schedules = [lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (first, second)]
    for step in range(6):
        for named in (numbers, tensors):
            give_gradients(named.values(), step)
        for optimizer, schedule in zip((first, second), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert first.param_groups[0]["lr"] == pytest.approx(0.02 / 7)
    assert second.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.02 / 7)
    assert torch.equal(values(numbers), values(tensors))


@pytest.mark.parametrize("schedule", [
    lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2),
    lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2, cycle_momentum=False),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, total_iters=2),
                                                        lr_scheduler.ConstantLR(o)], [2]),
])  # fmt: skip
def test_schedules_of_torch_run(make, schedule) -> None:
    named, optimizer = make()
    scheduler = schedule(optimizer)
    for step in range(6):
        give_gradients(named.values(), step)
        optimizer.step()
        scheduler.step()
    assert values(named).isfinite().all()


@pytest.mark.parametrize(
    "schedule",
    [lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=8, base_momentum=0.5),
     lambda o: lr_scheduler.CyclicLR(o, 1e-2, 5e-2, step_size_up=2, base_momentum=0.5)],
    ids=["one", "cyclic"],
)  # fmt: skip
def test_schedulers_that_cycle_the_momentum_do_to_beta1_what_they_do_to_adams(make, schedule) -> None:
    named, optimizer = make(beta2=0.98)
    others, by_hand = make(beta2=0.98)
    adam = torch.optim.AdamW(parameters().values(), betas=(0.9, 0.98))
    scheduler, model = schedule(optimizer), schedule(adam)
    seen = []
    for step in range(8):
        by_hand.param_groups[0]["lr"] = adam.param_groups[0]["lr"]
        by_hand.param_groups[0]["beta1"] = adam.param_groups[0]["betas"][0]
        seen.append(optimizer.param_groups[0]["beta1"])
        train(named, optimizer, range(step, step + 1))
        train(others, by_hand, range(step, step + 1))
        adam.step()
        if step < 7:
            scheduler.step()
            model.step()
    assert torch.equal(values(named), values(others))
    assert optimizer.param_groups[0]["betas"] == adam.param_groups[0]["betas"]
    assert min(seen) < 0.55 and max(seen) > 0.7


def test_a_momentum_that_cycles_goes_on_from_a_saved_state(make) -> None:
    def schedule(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12)

    named, optimizer = make()
    scheduler = schedule(optimizer)
    for step in range(12):
        if step == 5:
            halves = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        train(named, optimizer, range(step, step + 1))
        if step < 11:
            scheduler.step()
    resumed = DistributedShampoo(halves.items(), **SETTINGS)
    again = schedule(resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for step in range(5, 12):
        train(halves, resumed, range(step, step + 1))
        if step < 11:
            again.step()
    assert torch.equal(values(halves), values(named))


def test_both_betas_are_kept_in_one_place(make) -> None:
    named, optimizer = make(beta1=0.8)
    assert optimizer.defaults["betas"] == (0.8, 0.999)
    group = optimizer.param_groups[0]
    group["beta2"] = 0.9
    assert group["betas"] == (0.8, 0.9)
    group["betas"] = (0.7, 0.6)
    assert (group["beta1"], group["beta2"]) == (0.7, 0.6)
    optimizer.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(2)))], "beta1": 0.5})
    assert copy.deepcopy(optimizer).param_groups[1]["betas"] == (0.5, 0.999)
    with pytest.raises(KeyError, match="beta3"):
        group["beta3"]
    group["betas"] = 0.9
    with pytest.raises(ValueError, match="betas=0.9, which must be two numbers"):
        train(named, optimizer, range(1))


def test_a_state_that_names_each_beta_is_loaded(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["betas"]
    state["param_groups"][0] |= {"beta1": 0.8, "beta2": 0.7}
    _, other = make()
    other.load_state_dict(state)
    assert other.param_groups[0]["betas"] == (0.8, 0.7)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("settings", [{}, {"decoupled_learning_rate": False}, {"weight_decay": 0.1, "nesterov": True}])
def test_a_rate_is_the_same_number_as_a_tensor(make, shape, settings) -> None:
    numbers, first = make(**settings)
    tensors, second = make(lr=torch.full(shape, SETTINGS["lr"]), **settings)
    train(numbers, first, range(6))
    train(tensors, second, range(6))
    assert torch.equal(values(numbers), values(tensors))


@pytest.mark.parametrize("settings", [
    {"nesterov": True, "decoupled_weight_decay": True}, {"nesterov": True}, {"decoupled_learning_rate": False},
    {"weight_decay": 0.0}, {"beta2": 1.0}, {"graft_type": "adagrad"},
])  # fmt: skip
def test_numbers_and_scalars_on_the_device_give_the_same(make, monkeypatch, settings) -> None:
    from dalle_torch.optim.shampoo import optimizer as front

    numbers, first = make(**{"weight_decay": 0.1} | settings)
    train(numbers, first, range(6))
    factors = front.factors
    # As on torch_xla.
    monkeypatch.setattr(front, "factors", lambda options, device, compile: factors(options, device, True))
    tensors, second = make(**{"weight_decay": 0.1} | settings)
    train(tensors, second, range(6))
    moved = (values(numbers) - values(parameters())).norm()
    # float32 numbers, and products that are not fused, round differently; roots magnify it.
    assert (values(numbers) - values(tensors)).norm() <= 1e-3 * moved


@pytest.mark.parametrize(("name", "before", "after"), [
    ("preconditioning_compute_steps", 3, 1), ("preconditioning_compute_steps", 1, 3),
    ("statistics_compute_steps", 1, 2), ("start_preconditioning_step", 20, 5),
    ("start_preconditioning_step", 6, 20), ("beta2", 0.999, 1.0),
])  # fmt: skip
def test_what_may_change_in_a_run_changes_at_once(make, name, before, after) -> None:
    named, optimizer = make(**{name: before})
    train(named, optimizer, range(5))
    others = {key: torch.nn.Parameter(p.detach().clone()) for key, p in named.items()}
    loaded = DistributedShampoo(others.items(), **SETTINGS)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0][name] = after
    if name == "beta2":
        state["param_groups"][0]["betas"] = (0.9, after)
    loaded.load_state_dict(state)
    optimizer.param_groups[0][name] = after
    unchanged, kept = make(**{name: before})
    train(unchanged, kept, range(12))
    train(named, optimizer, range(5, 12))
    train(others, loaded, range(5, 12))
    assert torch.equal(values(named), values(others))
    assert not torch.equal(values(named), values(unchanged))


def test_the_start_cannot_be_put_off_once_it_was(make) -> None:
    named, optimizer = make()
    group = optimizer.param_groups[0]
    train(named, optimizer, range(3))
    group["start_preconditioning_step"] = 4
    train(named, optimizer, range(3, 6))
    group["start_preconditioning_step"] = 6
    train(named, optimizer, range(6, 7))
    group["start_preconditioning_step"] = 9
    before = values(named)
    words = "=9, and after 7 updates they are preconditioned already, so that it can be 7 at most"
    with pytest.raises(ValueError, match=words):
        train(named, optimizer, range(7, 8))
    assert torch.equal(values(named), before)
    group["start_preconditioning_step"] = 4
    others, other = make()
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["start_preconditioning_step"] = 9
    with pytest.raises(ValueError, match=words):
        train(others, other, range(7, 8))


def test_a_group_that_is_refused_leaves_the_others_as_they_were() -> None:
    named = parameters()
    first, second = dict(list(named.items())[:4]), dict(list(named.items())[4:])
    optimizer = DistributedShampoo([{"params": first.items()}, {"params": second.items()}], **SETTINGS)
    train(named, optimizer, range(2))
    before = values(named)
    optimizer.param_groups[1]["beta1"] = 3
    with pytest.raises(ValueError, match="beta1=3"):
        train(named, optimizer, range(2, 3))
    assert torch.equal(values(named), before)
    assert int(optimizer.state[named["a"]]["step"]) == 2
