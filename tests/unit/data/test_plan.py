"""The order of samples: each once an epoch whatever the shards' sizes, and the same from any place on."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.data.plan import Plan
from dalle_torch.hashing import hashed, permutation, uniform
from tests.shard_files import flat

plans = st.builds(
    Plan,
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8).map(tuple),
    lanes=st.integers(1, 9),
    seed=st.integers(-5, 2**70),
    window=st.integers(0, 30),
    shuffle_shards=st.booleans(),
)


def samples(plan, epoch, lane, position=0):
    return [(part.shard, part.first + n) for part in plan.segments(epoch, lane, position) for n in range(part.count)]


@given(plan=plans, epoch=st.integers(0, 3))
def test_lanes_share_all_samples_of_an_epoch(plan, epoch):
    lanes = [samples(plan, epoch, lane) for lane in range(plan.lanes)]
    assert sorted(flat(lanes)) == [(shard, n) for shard, count in enumerate(plan.counts) for n in range(count)]
    sizes = [len(lane) for lane in lanes]
    assert sizes == [plan.lane_size(lane) for lane in range(plan.lanes)]
    assert max(sizes) - min(sizes) <= 1


@given(plan=plans, epoch=st.integers(0, 2), data=st.data())
def test_from_any_position_on_it_is_the_rest(plan, epoch, data):
    lane = data.draw(st.integers(0, plan.lanes - 1))
    position = data.draw(st.integers(0, plan.lane_size(lane)))
    assert samples(plan, epoch, lane, position) == samples(plan, epoch, lane)[position:]


@given(plan=plans, data=st.data())
def test_windows_are_permutations(plan, data):
    lane = data.draw(st.integers(0, plan.lanes - 1))
    width = max(plan.window, 1)
    sizes = []
    for number in range(plan.lane_size(lane) // width + 2):
        order = list(plan.window_order(0, lane, number))
        assert sorted(order) == list(range(len(order)))
        sizes.append(len(order))
    assert sum(sizes) == plan.lane_size(lane)


def test_epochs_seeds_and_lanes_have_orders_of_their_own():
    plan = Plan(counts=(50,) * 20, lanes=4, seed=1, window=100)
    orders = {
        tuple(samples(Plan(counts=plan.counts, lanes=4, seed=seed), epoch, 0)) for seed in (1, 2) for epoch in range(3)
    }
    assert len(orders) == 6
    assert len({tuple(plan.window_order(epoch, lane, n)) for epoch in (0, 1) for lane in (0, 1) for n in (0, 1)}) == 8


def test_as_they_lie_without_shuffling():
    plan = Plan(counts=(3, 0, 2), lanes=2, window=0, shuffle_shards=False)
    assert samples(plan, 0, 0) == samples(plan, 7, 0) == [(0, 0), (0, 1)]
    assert samples(plan, 0, 1) == [(0, 2), (2, 0), (2, 1)]


def test_blanking_is_a_share_and_does_not_depend_on_lanes():
    of_one = Plan(counts=(10_000,), lanes=1, blank_prob=0.2).blanked(3, 0, 0, 10_000)
    of_four = [Plan(counts=(10_000,), lanes=4, blank_prob=0.2).blanked(3, lane, 0, 2500) for lane in range(4)]
    assert flat(of_four) == of_one
    assert 1850 < sum(of_one) < 2150  # 2000 expected, standard deviation 40
    assert Plan(counts=(5,), lanes=1, blank_prob=1.0).blanked(0, 0, 0, 5) == [True] * 5
    assert Plan(counts=(5,), lanes=1).blanked(0, 0, 0, 5) == [False] * 5


def test_numbers_depend_on_keys_and_index_alone():
    keys = (3, 4)
    whole = hashed(keys, 0, 100)
    assert np.array_equal(np.concatenate([hashed(keys, 0, 33), hashed(keys, 33, 100)]), whole)
    assert len(set(whole.tolist())) == 100
    assert not np.array_equal(hashed((4, 3), 0, 100), whole)
    # The order of a run must stay what it is: it is in checkpoints.
    assert permutation((1, 2, 3), 8).tolist() == [7, 6, 4, 1, 3, 2, 0, 5]
    assert uniform(keys, 0, 1000).min() >= 0 and uniform(keys, 0, 1000).max() < 1
