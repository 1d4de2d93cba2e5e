"""Blocks change devices: the same blocks as on one device, as many on each, and only parts of blocks on the way."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dalle_torch.optim.shampoo.blocking import Region, regions
from dalle_torch.parallel.blocks import Exchange, plan_exchange
from tests.spmd.shampoo_on_meshes import SETTINGS, SHAPES

POWERS = st.sampled_from([1, 2, 4, 8])
COUNTS = st.tuples(POWERS, POWERS)
MEGA = {"q_proj": ((2048, 2048), 0), "out_proj": ((2048, 2048), 1), "up_proj": ((4096, 2048), 0)}


def plan(shape: tuple[int, ...], split: int, block: int, parameters: int, dp: int, mp: int) -> Exchange | None:
    (region,) = regions(shape, block)
    count = -(-parameters * region.blocks // (dp * mp)) * dp * mp
    spec = tuple("mp" if dim == split else None for dim in range(len(shape)))
    return plan_exchange(shape, region, spec, count, dp, mp)


@given(
    dp=POWERS, mp=POWERS, counts=st.tuples(POWERS, POWERS), split=st.sampled_from([0, 1]), parameters=st.integers(1, 9)
)
def test_blocks_are_those_of_one_device(dp: int, mp: int, counts: tuple[int, int], split: int, parameters: int) -> None:
    size = 8
    shape = (counts[0] * size, counts[1] * size)
    exchange = plan(shape, split, size, parameters, dp, mp)
    assume(exchange is not None)
    assert exchange is not None
    (region,) = regions(shape, size)
    assert exchange.kept * exchange.exchanged == mp
    assert exchange.filled >= parameters
    stack = torch.arange(exchange.filled * shape[0] * shape[1], dtype=torch.float64).view(-1, *shape)
    steps = [
        (exchange.parts, exchange.spread), (exchange.spread, exchange.apart), (exchange.apart, exchange.gathered),
        (exchange.joined, exchange.blocks),
    ]  # fmt: skip
    found = stack
    for before, after in steps:
        found = exchange.rewrite(found, before, after)
    assert torch.equal(found, region.cut(stack))
    for before, after in reversed(steps):
        found = exchange.rewrite(found, after, before)
    assert torch.equal(found, stack)


@given(
    dp=POWERS, mp=POWERS, counts=st.tuples(POWERS, POWERS), split=st.sampled_from([0, 1]), parameters=st.integers(1, 9)
)
def test_each_device_ends_with_blocks_of_its_own(
    dp: int, mp: int, counts: tuple[int, int], split: int, parameters: int
) -> None:
    shape = (counts[0] * 8, counts[1] * 8)
    exchange = plan(shape, split, 8, parameters, dp, mp)
    assume(exchange is not None)
    assert exchange is not None
    stack = torch.zeros(exchange.filled, *shape)
    spread = exchange.rewrite(stack, exchange.parts, exchange.spread)
    apart = exchange.rewrite(spread, exchange.spread, exchange.apart)
    assert spread.shape[:2] == (dp, mp)
    assert apart.shape[:4] == (dp, exchange.kept, exchange.exchanged, exchange.exchanged)
    devices = torch.arange(dp * mp).view(dp, exchange.kept, 1, exchange.exchanged, 1).expand(apart.shape)
    joined = exchange.rewrite(devices, exchange.apart, exchange.gathered)
    owners = exchange.rewrite(joined, exchange.joined, exchange.blocks)
    # Neighbours lie on one device, as a tensor that is split evenly along its first dimension does.
    of_device = owners.unflatten(0, (dp * mp, -1)).flatten(1)
    assert (of_device == of_device[:, :1]).all()
    assert of_device[:, 0].unique().numel() == dp * mp


@pytest.mark.parametrize(("dp", "mp"), [(4, 8), (32, 8), (64, 4), (64, 8), (256, 8)])
@pytest.mark.parametrize("name", MEGA)
def test_mega_s_matrices_are_exchanged(name: str, dp: int, mp: int) -> None:
    shape, split = MEGA[name]
    assert plan(shape, split, 1024, 256 * 1024**2 // (shape[0] * shape[1]), dp, mp) is not None


@pytest.mark.parametrize(("dp", "mp"), [(4, 2), (2, 4)])
def test_matrices_of_the_tests_on_devices_are_exchanged(dp: int, mp: int) -> None:
    assert plan(SHAPES["query"], 0, SETTINGS["block_size"], 2, dp, mp) is not None


def test_mega_s_devices_exchange_with_few() -> None:
    found = {
        name: plan(shape, split, 1024, 2**28 // (shape[0] * shape[1]), 32, 8) for name, (shape, split) in MEGA.items()
    }
    assert {name: (one.kept, one.exchanged) for name, one in found.items() if one} == {
        "q_proj": (2, 4), "out_proj": (2, 4), "up_proj": (4, 2),
    }  # fmt: skip


def test_what_does_not_divide_is_left_to_xla() -> None:
    assert plan((24, 16), 0, 8, 1, 4, 2) is None  # three blocks along the split, so that 4 x 2 do not cut evenly
    assert plan_exchange((16, 16), Region((0, 0), (2, 2), (8, 8)), (None, None), 8, 4, 2) is None
    assert plan_exchange((20, 16), Region((0, 0), (2, 2), (8, 8)), ("mp", None), 8, 4, 2) is None
    assert plan_exchange((16,), Region((0,), (2,), (8,)), ("mp", None), 8, 4, 2) is None
