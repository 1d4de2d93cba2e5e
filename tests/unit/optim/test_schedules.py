"""Learning rates over time: they start at zero, reach their height, and go where the schedule says."""

import json
import math
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.config import ExponentialConfig, OptimizerConfig, PlateauConfig
from dalle_torch.optim.schedules import PlateauState, learning_rate, observe

SCHEDULES = ("constant", "linear", "cosine", "exponential", "plateau")


def _config(schedule: str, **options: Any) -> OptimizerConfig:
    if schedule == "exponential":
        options = {"exponential": ExponentialConfig(decay_rate=0.7, transition_steps=9)} | options
    return OptimizerConfig(schedule=schedule, **options)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_to_its_height_and_falls_to_its_end(schedule: str) -> None:
    final = 0.0 if schedule == "constant" else 0.1
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule=schedule, final_lr=final)
    rates = [learning_rate(config, step, 110) for step in range(111)]
    # The line of the original trainer: from zero, over warmup_steps + 1 updates.
    assert rates[:10] == pytest.approx([step / 11 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert rates[60] == pytest.approx(1.0 if schedule == "constant" else 0.55)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


@given(
    schedule=st.sampled_from(SCHEDULES),
    offset=st.integers(0, 20),
    warmup=st.integers(0, 20),
    steps=st.integers(0, 100),
    reductions=st.integers(0, 5),
    final=st.floats(0, 0.5),
)
def test_every_schedule_is_zero_then_rises_then_falls_no_lower_than_its_end(
    schedule: str, offset: int, warmup: int, steps: int, reductions: int, final: float
) -> None:
    final = 0.0 if schedule == "constant" else final
    config = _config(schedule, lr=0.5, offset_steps=offset, warmup_steps=warmup, final_lr=final)
    plateau = PlateauState(reductions=reductions)
    rates = [learning_rate(config, step, steps, plateau) for step in range(offset + warmup + 60)]
    start = offset + warmup
    assert all(rate == 0 for rate in rates[:offset])
    assert all(later > earlier for earlier, later in pairwise(rates[offset:start]))
    assert all(math.isfinite(rate) and 0 <= rate <= 0.5 for rate in rates)
    # Rounding of final_lr + (lr - final_lr) * share is in the last bit.
    assert all(rate >= final - 1e-15 for rate in rates[start:])
    assert all(later <= earlier for earlier, later in pairwise(rates[start:]))
    # A run that is no longer than its warm-up has nothing after it.
    if schedule != "plateau" and steps > start:
        assert rates[start] == 0.5


@given(offset=st.integers(0, 50), step=st.integers(0, 200), schedule=st.sampled_from(("constant", "exponential")))
def test_an_offset_moves_the_curve(offset: int, step: int, schedule: str) -> None:
    plain, moved = _config(schedule, warmup_steps=7), _config(schedule, warmup_steps=7, offset_steps=offset)
    assert learning_rate(moved, step + offset, 1000) == learning_rate(plain, step, 1000)


@given(step=st.integers(0, 500), every=st.integers(1, 60))
def test_a_staircase_meets_the_smooth_curve_at_the_start_of_each_stair(step: int, every: int) -> None:
    smooth, stairs = (
        _config(
            "exponential",
            lr=1.0,
            warmup_steps=0,
            exponential=ExponentialConfig(decay_rate=0.9, transition_steps=every, staircase=staircase),
        )
        for staircase in (False, True)
    )
    rate = learning_rate(stairs, step, 1000)
    assert rate == pytest.approx(0.9 ** (step // every), rel=1e-12)
    assert rate == learning_rate(stairs, step // every * every, 1000)
    assert rate == pytest.approx(learning_rate(smooth, step // every * every, 1000), rel=1e-12)
    assert rate >= learning_rate(smooth, step, 1000) * (1 - 1e-12)


def test_a_run_without_warm_up_starts_at_its_height() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=0)
    assert learning_rate(config, 0, 5) == 1.0
    assert math.isfinite(learning_rate(config, 0, 0))


def _after(config: OptimizerConfig, losses: list[float], state: PlateauState | None = None) -> PlateauState:
    state = state or PlateauState()
    for loss in losses:
        state = observe(config, state, 1000, loss)
    return state


def test_the_rate_is_lowered_when_the_loss_stalls() -> None:
    config = _config("plateau", lr=1.0, warmup_steps=2, plateau=PlateauConfig(factor=0.5, patience=1, threshold=0.1))
    assert _after(config, [2.0, 1.7]) == PlateauState(best=1.7)
    # 1.6 is lower, but not by a tenth; the second such evaluation is one too many.
    assert _after(config, [2.0, 1.7, 1.6]) == PlateauState(best=1.7, stalled=1)
    assert _after(config, [2.0, 1.7, 1.6, 1.6]) == PlateauState(best=1.7, reductions=1)
    assert _after(config, [2.0, 1.7, 1.6, 1.0, 1.0]) == PlateauState(best=1.0, stalled=1)
    assert _after(config, [math.nan, 2.0, math.nan, math.inf]) == PlateauState(best=2.0, stalled=0, reductions=1)
    assert learning_rate(config, 10, 20, PlateauState(reductions=3)) == 0.125


def test_a_plateau_ends_at_the_final_rate() -> None:
    config = _config("plateau", lr=1.0, warmup_steps=0, final_lr=0.3)
    assert learning_rate(config, 10, 20, PlateauState(reductions=1)) == 0.5
    assert learning_rate(config, 10, 20, PlateauState(reductions=9)) == 0.3


def test_evaluations_before_the_end_of_the_warm_up_do_not_count() -> None:
    config = _config("plateau", offset_steps=3, warmup_steps=2)
    assert observe(config, PlateauState(), 5, 1.0) == PlateauState()
    assert observe(config, PlateauState(), 6, 1.0) == PlateauState(best=1.0)


def test_other_schedules_see_nothing() -> None:
    assert _after(_config("linear"), [1.0, 1.0, 1.0, 1.0]) == PlateauState()


losses = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30)


@given(first=losses, second=losses, patience=st.integers(0, 3), factor=st.floats(0.1, 0.9))
def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been(
    first: list[float], second: list[float], patience: int, factor: float
) -> None:
    config = _config("plateau", plateau=PlateauConfig(patience=patience, factor=factor))
    middle = _after(config, first)
    saved = PlateauState(**json.loads(json.dumps(asdict(middle), allow_nan=False)))
    assert _after(config, second, saved) == _after(config, first + second)
    assert middle.reductions * (patience + 1) + middle.stalled <= len(first)
