"""Rows over seeds: means, spread, equal seconds, the choice of a learning rate, and what may be called a difference."""

import csv
import io
import json

import pytest

from dalle_torch.studies.compare_table import COLUMNS, build_comparison, verdict
from tests.unit.studies.results import result


def test_means_and_spread_are_over_seeds() -> None:
    found = build_comparison(
        "T", {"a": [result("a", 0, [3.0, 2.0]), result("a", 1, [3.0, 2.4])],
              "b": [result("b", 0, [3.0, 1.9]), result("b", 1, [3.0, 2.2])]}, seeds=[0, 1], chance=4.0,
    )  # fmt: skip
    first, second = found.rows
    assert (first.loss, first.low, first.high) == pytest.approx((2.2, 2.0, 2.4))
    assert (first.against, first.verdict) == (None, "")
    # -0.1 and -0.2: each seed against the same seed.
    assert second.against == pytest.approx(-0.15)
    assert second.verdict == "2 of 2 lower"
    assert first.memory == 200 * 2**20 and first.cells()["memory"] == 200
    assert found.missing == 0


def test_equal_seconds_are_those_of_the_fastest_row() -> None:
    found = build_comparison(
        "T", {"fast": [result("fast", 0, [3.0, 2.0], step_seconds=0.5)],
              "slow": [result("slow", 0, [3.0, 1.0], step_seconds=2 / 3)]}, seeds=[0], chance=4.0,
    )  # fmt: skip
    assert found.seconds == 10.0
    assert found.rows[0].loss_at_seconds == 2.0
    # 10 s are step 15 of the slow one.
    assert found.rows[1].loss_at_seconds == pytest.approx(2.0)


def test_a_run_that_was_done_sooner_has_its_last_loss_at_equal_seconds() -> None:
    runs = [result("a", 0, [3.0, 2.0], step_seconds=0.4), result("a", 1, [3.0, 2.2], step_seconds=0.6)]
    found = build_comparison("T", {"a": runs}, seeds=[0, 1], chance=4.0)
    assert found.seconds == 10.0
    # The second one is at step 16.7 of 20 then.
    assert found.rows[0].loss_at_seconds == pytest.approx((2.0 + 3.0 - 0.8 * (10 / 0.6 / 10 - 1)) / 2)


def test_the_best_rate_of_the_first_seed_is_shown_and_the_others_are_told() -> None:
    runs = [
        result("a", 0, [2.5], lr=0.1), result("a", 0, [2.0], lr=0.2),
        result("a", 1, [2.2], lr=0.2),
        # A rate that was better with another seed alone was not chosen by it.
        result("a", 1, [1.0], lr=0.1),
    ]  # fmt: skip
    (row,) = build_comparison("T", {"a": runs}, seeds=[0, 1], chance=4.0).rows
    assert (row.lr, row.loss) == (0.2, pytest.approx(2.1))
    assert row.rates == {0.1: 2.5, 0.2: 2.0}
    assert row.trouble == ["best at the highest lr tried"]


def test_a_run_that_diverged_is_told_of_and_not_averaged() -> None:
    runs = [result("a", 0, [3.0, 2.0]), result("a", 1, [3.0], error="the loss is nan at step 17")]
    found = build_comparison("T", {"a": runs, "b": []}, seeds=[0, 1], chance=4.0)
    (row,) = found.rows
    assert row.loss == 2.0 and row.trouble == ["seed 1: the loss is nan at step 17"]
    assert found.missing == 2
    only = build_comparison("T", {"a": runs[1:]}, seeds=[1], chance=4.0)
    assert only.rows[0].loss is None and only.seconds is None
    assert "-" in only.text() and only.csv()


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], ""),
        ([0.1], "one seed alone"),
        ([0.1, 0.12, 0.11], "3 of 3 higher"),
        ([-0.1, -0.12], "2 of 2 lower"),
        ([-0.1, 0.02, -0.1], "2 of 3 lower, within the spread"),
        ([-0.01, -0.3, -0.02], "3 of 3 lower, within the spread"),
    ],
)
def test_a_difference_needs_all_seeds_and_more_than_their_spread(differences: list[float], expected: str) -> None:
    assert verdict(differences) == expected


def test_csv_json_and_text_have_all_rows() -> None:
    found = build_comparison(
        "T", {"a, with comma": [result("a, with comma", 0, [2.0])], "b": [result("b", 0, [1.5])]}, [0], 4.0
    )
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [row["name"] for row in rows] == ["a, with comma", "b"]
    assert list(rows[0]) == list(COLUMNS) and float(rows[1]["loss"]) == 1.5
    told = json.loads(json.dumps(found.to_json()))
    assert told["rows"][1]["runs"][0]["measured"]["losses"] == [1.5]
    lines = found.text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("b ") and "-0.5000" in lines[2]
