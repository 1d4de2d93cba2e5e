"""The curve of a run: what is read of it, and when it has gone wrong."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.studies.compare_measure import Measured, divergence, interpolate, read_metrics, spikes


def test_metrics_give_losses_and_the_median_step(tmp_path: Path) -> None:
    rows = [
        {"step": 2, "loss": 3.0, "seconds_per_step": 9.0, "cpu_seconds_per_step": 5.0},
        {"step": 2, "eval_loss": 3.1, "eval_loss/shapes": 3.1},
        {"step": 4, "loss": 2.0, "seconds_per_step": 2.0, "cpu_seconds_per_step": 1.0},
        {"step": 4, "event": "saved"},
        {"step": 6, "loss": None, "nonfinite": {"loss": "nan"}, "seconds_per_step": 2.5, "cpu_seconds_per_step": 1.5},
        {"step": 6, "eval_loss": 2.1},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_metrics(file, processor_time=True)
    assert (found.steps, found.losses, found.training_steps) == ([2, 6], [3.1, 2.1], [2, 4, 6])
    assert found.training_losses[:2] == [3.0, 2.0] and math.isnan(found.training_losses[2])
    # The first one has what is slow once, as compilation.
    assert (found.step_seconds, found.wall_step_seconds) == (1.5, 2.5)
    assert found.seconds == [3.0, 9.0]
    assert read_metrics(file, processor_time=False).step_seconds == 2.5
    assert Measured.from_json(json.loads(json.dumps(found.to_json()))).losses == found.losses


def test_a_run_that_learns_is_left_alone() -> None:
    measured = Measured([10, 20], [3.0, 2.0], list(range(10)), [4.0 - 0.2 * i for i in range(10)])
    assert divergence(measured, chance=4.0) == []


@pytest.mark.parametrize(
    ("losses", "training", "error", "message"),
    [
        ([3.0, 3.99], [4.0], None, "ends at chance (3.990 of 4.000)"),
        ([2.0, 2.5], [4.0], None, "ends at 2.500, above its best of 2.000"),
        ([3.0, math.nan], [4.0], None, "not a number"),
        ([3.0], [4.0, math.inf], None, "not a number"),
        ([3.0], [3.0] * 5 + [9.0, 3.0], None, "1 spike of the training loss (step 5)"),
        ([], [], "the loss is nan at step 7", "the loss is nan at step 7"),
    ],
)
def test_divergence_is_noticed(losses: list[float], training: list[float], error: str | None, message: str) -> None:
    measured = Measured(list(range(len(losses))), losses, list(range(len(training))), training)
    (found,) = divergence(measured, chance=4.0, error=error)
    assert message in found


@given(st.lists(st.floats(1.0, 1.2), max_size=40))
def test_noise_of_a_fifth_is_no_spike(losses: list[float]) -> None:
    assert spikes(losses) == []


@given(st.lists(st.floats(1.0, 1.2), min_size=5, max_size=40), st.integers(0, 1000))
def test_a_loss_of_twice_the_others_is_one(losses: list[float], place: int) -> None:
    place = 5 + place % (len(losses) - 4)
    assert spikes([*losses[:place], 2.5, *losses[place:]]) == [place]


def test_a_lasting_rise_is_told_until_it_is_what_is_usual() -> None:
    assert spikes([1.0] * 5 + [3.0] * 6) == [5, 6, 7]


@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=10, unique=True).map(sorted),
    st.floats(0, 1), st.floats(-5, 5), st.floats(-5, 5),
)  # fmt: skip
def test_interpolation_of_a_line_is_the_line(xs: list[float], share: float, slope: float, offset: float) -> None:
    x = min(max(xs[0] + share * (xs[-1] - xs[0]), xs[0]), xs[-1])
    found = interpolate(xs, [slope * at + offset for at in xs], x)
    # Points may lie close together, and rounding is relative to the largest value, 505.
    assert found == pytest.approx(slope * x + offset, abs=1e-9)


def test_nothing_is_told_outside_of_what_was_measured() -> None:
    assert interpolate([1.0, 2.0], [5.0, 4.0], 0.9) is None
    assert interpolate([1.0, 2.0], [5.0, 4.0], 2.1) is None
    assert interpolate([], [], 1.0) is None
    assert interpolate([1.0, 2.0], [5.0, 4.0], 2.0) == 4.0
