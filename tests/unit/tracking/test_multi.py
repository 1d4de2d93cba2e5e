"""A tracker that fails is a warning, and never the end of a run."""

import logging
from collections.abc import Mapping
from typing import Any

import pytest

from dalle_torch.tracking import Histogram, MultiTracker, NullTracker


class Failing(NullTracker):
    """Raises in the calls of the given numbers; notes all of them."""

    def __init__(self, failing: set[int] | range) -> None:
        self.failing = failing
        self.calls = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls += 1
        if self.calls in self.failing:
            raise RuntimeError("no\nnetwork")

    def finish(self, status: str) -> None:
        raise KeyError(status)


class Noting(NullTracker):
    def __init__(self) -> None:
        self.noted: list[Any] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.noted.append((step, dict(metrics)))

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        self.noted.append((step, dict(values)))

    def images(self, name: str, images: Any, captions: Any, step: int) -> None:
        self.noted.append((step, name, list(images), list(captions)))

    def event(self, kind: str, fields: Mapping[str, Any], step: int) -> None:
        self.noted.append((step, kind, dict(fields)))

    def finish(self, status: str) -> None:
        self.noted.append(status)


def test_the_others_get_everything_past_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    failing, noting = Failing(range(100)), Noting()
    tracker = MultiTracker([failing, noting])
    histogram = Histogram((1,), (0.0, 1.0), 1.0)
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 2.0}, 2)
        tracker.histograms({"w": histogram}, 2)
        tracker.images("samples", [], [], 2)
        tracker.event("save", {"path": "x"}, 2)
        tracker.finish("finished")
    assert noting.noted == [
        (1, {"loss": 1.0}), (2, {"loss": 2.0}), (2, {"w": histogram}), (2, "samples", [], []),
        (2, "save", {"path": "x"}), "finished",
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        "Failing failed, the training goes on: RuntimeError: no network"
    ]


def test_one_that_fails_again_and_again_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing(range(100))
    tracker = MultiTracker([failing], max_failures=3)
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        for step in range(10):
            tracker.log({}, step)
    assert failing.calls == 3 and tracker.trackers == []
    assert len(caplog.records) == 2 and "failed 3 times in a row and gets no more" in caplog.text


def test_one_that_recovers_stays() -> None:
    failing = Failing({1, 2, 4, 5, 7, 8})
    tracker = MultiTracker([failing], max_failures=3)
    for step in range(10):
        tracker.log({}, step)
    assert failing.calls == 10


def test_ctrl_c_is_no_failure() -> None:
    class Interrupted(NullTracker):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MultiTracker([Interrupted()]).log({}, 1)
