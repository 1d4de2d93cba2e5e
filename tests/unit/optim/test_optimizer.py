"""The manners of a torch optimizer: groups, closures, schedulers, scaling, missing gradients, dtypes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dalle_torch.optim import DistributedShampoo
from tests.unit.optim.conftest import SETTINGS, give_gradients, parameters, train, values

GRAFTS = ("sgd", "sqrt_n", "rmsprop", "rmsprop_normalized", "adagrad", "adagrad_normalized")


@pytest.mark.parametrize("graft", GRAFTS)
def test_it_finds_the_bottom_of_a_bent_bowl(graft) -> None:
    torch.manual_seed(0)
    bowl = torch.randn(8, 8) @ torch.diag(torch.logspace(0, -1, 8))
    weight = nn.Parameter(torch.randn(8, 6))
    optimizer = DistributedShampoo([weight], lr=0.05, graft_type=graft, start_preconditioning_step=5,
                                   preconditioning_compute_steps=2)  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (bowl @ weight).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_equal_shapes_together_give_what_they_give_alone(make) -> None:
    together, optimizer = make()
    alone = parameters()
    lone = [DistributedShampoo([parameter], **SETTINGS) for parameter in alone.values()]
    for step in range(8):
        for named in (together, alone):
            give_gradients(named.values(), step)
        optimizer.step()
        for other in lone:
            other.step()
    # Alone, the largest block of a group is smaller for some, and so is the ridge; and products add in another order.
    moved = (values(together) - values(parameters())).norm()
    assert (values(together) - values(alone)).norm() < 1e-2 * moved


def test_a_group_has_settings_of_its_own() -> None:
    named = parameters()
    first, second = dict(list(named.items())[:4]), dict(list(named.items())[4:])
    other = {"lr": 1e-3, "graft_type": "sgd", "block_size": 3, "best_effort_memory_usage_reduction": True}
    optimizer = DistributedShampoo([{"params": first.items()}, {"params": second.items(), **other}], **SETTINGS)
    train(named, optimizer, range(6))
    apart = parameters()
    for part, settings in ((list(apart)[:4], SETTINGS), (list(apart)[4:], SETTINGS | other)):
        chosen = {name: apart[name] for name in part}
        alone = DistributedShampoo(chosen.items(), **settings)
        for step in range(6):
            give_gradients(apart.values(), step)
            alone.step()
    assert torch.equal(values(named), values(apart))


def test_a_group_that_comes_later_has_its_own_clock(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(4))
    late = {"late": nn.Parameter(torch.ones(8, 6))}
    optimizer.add_param_group({"params": late.items()})
    fresh = {"late": nn.Parameter(torch.ones(8, 6))}
    alone = DistributedShampoo(fresh.items(), **SETTINGS)
    for step in range(4, 9):
        give_gradients(named.values(), step)
        for parameters_ in (late, fresh):
            give_gradients(parameters_.values(), step)
        optimizer.step()
        alone.step()
    assert torch.equal(values(late), values(fresh))
    assert int(optimizer.state[late["late"]]["step"]) == 5
    assert int(optimizer.state[named["a"]]["step"]) == 9


def test_a_closure_is_called_once_with_gradients_on(make) -> None:
    named, optimizer = make()
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(parameter.square().sum() for parameter in named.values())
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    before = values(named)
    loss = optimizer.step(closure)
    assert calls == [True]
    assert float(loss.detach()) == pytest.approx(float(before.square().sum()))
    assert not torch.equal(values(named), before)


def test_parameters_without_a_gradient_stay_as_they_are(make) -> None:
    named, optimizer = make()
    train(named, optimizer, range(3))
    before, state = named["a"].detach().clone(), copy.deepcopy(optimizer.state[named["a"]])
    give_gradients(named.values(), 3)
    named["a"].grad = None
    optimizer.step()
    assert torch.equal(named["a"], before)
    for name, tensor in state.items():
        assert torch.equal(tensor, optimizer.state[named["a"]][name]), name
    assert not torch.equal(named["b"], parameters()["b"])


def test_no_gradient_at_all_is_no_update(make) -> None:
    named, optimizer = make()
    optimizer.step()
    assert not optimizer.state
    train(named, optimizer, range(2))
    before = values(named)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(values(named), before)
    assert int(optimizer.state[named["b"]]["step"]) == 2


def test_frozen_parameters_cost_no_state_until_they_thaw(make) -> None:
    named, optimizer = make()
    named["odd"].requires_grad_(False)
    optimizer.prepare()
    assert named["odd"] not in optimizer.state and named["a"] in optimizer.state
    for step in range(5):
        give_gradients(named.values(), step)
        named["odd"].grad = None
        optimizer.step()
    assert torch.equal(named["odd"], parameters()["odd"])
    named["odd"].requires_grad_(True)
    train(named, optimizer, range(5, 8))
    assert int(optimizer.state[named["odd"]]["step"]) == 3
    assert not torch.equal(named["odd"], parameters()["odd"])


def test_scaled_gradients_are_unscaled_and_overflows_skip_the_step(make) -> None:
    plain, first = make()
    scaled, second = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        give_gradients(plain.values(), step)
        first.step()
        give_gradients(scaled.values(), step)
        for parameter in scaled.values():
            parameter.grad = scaler.scale(parameter.grad)
        scaler.step(second)
        scaler.update()
    # A power of two changes no digit.
    assert torch.equal(values(plain), values(scaled))
    give_gradients(scaled.values(), 4)
    scaled["a"].grad[0, 0] = float("inf")
    scaler.step(second)
    scaler.update()
    assert torch.equal(values(plain), values(scaled))
    assert scaler.get_scale() == 512.0


def test_bfloat16_parameters_have_float32_state(make) -> None:
    full, first = make()
    half, second = make(torch.bfloat16)
    train(full, first, range(6))
    train(half, second, range(6))
    for parameter in half.values():
        assert parameter.dtype == torch.bfloat16
        state = second.state[parameter]
        assert {t.dtype for name, t in state.items() if t.is_floating_point()} == {torch.float32}
    # Each of 6 updates rounds to 8 bits, as the gradients are: 6 * 2^-9 of values up to 3.
    torch.testing.assert_close(values(half), values(full), atol=0.05, rtol=0)


def test_sparse_and_complex_are_refused_by_name() -> None:
    table, plain = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.zeros(3))
    optimizer = DistributedShampoo([("table", table.weight), ("plain", plain)])
    table(torch.tensor([1, 2])).sum().backward()
    plain.grad = torch.ones(3)
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match=r"table \(torch.sparse_coo, torch.float32\).*sparse=False"):
        optimizer.step()
    assert torch.equal(table.weight, before)
    with pytest.raises(ValueError, match="w is torch.complex64; n is torch.int64"):
        DistributedShampoo([("w", nn.Parameter(torch.zeros(2, dtype=torch.complex64))), ("n", torch.zeros(2).long())])


def test_hooks_and_copies_work(make) -> None:
    named, optimizer = make()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(named, optimizer, range(1))
    assert seen == ["before", "after"]
    train(named, optimizer, range(1, 4))
    for twin_named, twin in (copy.deepcopy((named, optimizer)), pickle.loads(pickle.dumps((named, optimizer)))):
        expected, twins = copy.deepcopy((named, optimizer)), (twin_named, twin)
        train(*expected, range(4, 7))
        train(*twins, range(4, 7))
        assert torch.equal(values(expected[0]), values(twin_named))
        # The state that is shown is the state that is used.
        assert int(twin.state[twin_named["a"]]["step"]) == 7


def test_memory_formats_and_transposed_gradients_make_no_difference() -> None:
    plain = nn.Parameter(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
    other = nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    first, second = (DistributedShampoo([p], **SETTINGS | {"merge_small_dims_block_size": 25}) for p in (plain, other))
    for step in range(6):
        give_gradients([plain], step)
        other.grad = plain.grad.to(memory_format=torch.channels_last)
        first.step()
        second.step()
    # Norms add in another order.
    torch.testing.assert_close(other.detach().contiguous(), plain.detach(), rtol=1e-5, atol=1e-5)


def test_large_skipped_parameters_are_updated_in_pieces_that_make_no_difference(monkeypatch) -> None:
    from dalle_torch.optim.shampoo import bucket

    found = []
    for limit in (1 << 17, 16):
        monkeypatch.setitem(bucket._RUN_ELEMENTS, "cpu", limit)
        named = parameters()
        train(named, DistributedShampoo(named.items(), **SETTINGS), range(6))
        found.append(values(named))
    # The norms of several tensors together and of each alone add in another order.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_empty_and_scalar_parameters_are_no_trouble(shape) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = DistributedShampoo([parameter], **SETTINGS)
    train({"p": parameter}, optimizer, range(4))
    assert parameter.isfinite().all()
    optimizer.load_state_dict(optimizer.state_dict())


def test_roots_due_tells_the_two_kinds_of_steps_apart(make) -> None:
    named, optimizer = make()
    optimizer.prepare()
    found = []
    for step in range(5):
        found.append(optimizer.roots_due)
        train(named, optimizer, range(step, step + 1))
    assert found == [True, False, True, False, True]


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "nesterov": True}], ids=["plain", "decay"])
def test_a_compiled_update_is_the_plain_one_whatever_the_rate(make, settings) -> None:
    named, plain = make(skip_preconditioning_dim_size_gt=4, **settings)
    others, compiled = make(skip_preconditioning_dim_size_gt=4, compile=True, **settings)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    programs = []
    for step in range(6):
        for optimizer in (plain, compiled):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        train(named, plain, range(step, step + 1))
        train(others, compiled, range(step, step + 1))
        programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # One program a kind of shape, none for a new rate.
    assert programs[0] > 0 and len(set(programs)) == 1
    # The same operations, fused: float32 rounds differently.
    torch.testing.assert_close(values(others), values(named), rtol=1e-5, atol=1e-6)
    copy.deepcopy(compiled)


def test_clocks_count_a_parameters_own_updates_whoever_it_was_stacked_with(make) -> None:
    named, optimizer = make()
    alone = nn.Parameter(named["b"].detach().clone())
    apart = DistributedShampoo([alone], **SETTINGS)
    for step in range(12):
        give_gradients(named.values(), step)
        alone.grad = named["b"].grad.clone() if step % 3 == 0 else None
        named["b"].grad = None if alone.grad is None else named["b"].grad
        optimizer.step()
        apart.step()
    assert {name: int(optimizer.state[named[name]]["step"]) for name in ("a", "b")} == {"a": 12, "b": 4}
    # Products of other batch sizes round differently.
    torch.testing.assert_close(named["b"], alone, rtol=1e-4, atol=1e-6)


def test_parameters_that_take_turns_go_on_from_a_saved_state(make) -> None:
    def turns(named, optimizer, steps) -> None:
        for step in steps:
            give_gradients(named.values(), step)
            named["a" if step % 2 else "b"].grad = None
            optimizer.step()

    whole, through = make()
    turns(whole, through, range(12))
    named, first = make()
    turns(named, first, range(5))
    second = DistributedShampoo(named.items(), **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    turns(named, second, range(5, 12))
    assert torch.equal(values(named), values(whole))


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_size", 2), ("skip_preconditioning_dim_size_gt", 2), ("best_effort_memory_usage_reduction", True),
     ("graft_type", "sgd")],
)  # fmt: skip
def test_what_the_state_is_made_of_cannot_change(make, name, value) -> None:
    named, optimizer = make()
    train(named, optimizer, range(2))
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}={value!r}, and its state was made with"):
        train(named, optimizer, range(2, 3))
