"""Several trackers as one that never fails.

Owns: what a tracker's failure means to a run: a warning. Does not own: trackers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dalle_torch.log import get_logger
from dalle_torch.tracking.base import Histogram, Tracker

if TYPE_CHECKING:
    from PIL.Image import Image

logger = get_logger(__name__)

MAX_FAILURES = 10


class MultiTracker:
    """Hands everything to each of `trackers`, in their order.

    The first failure of a tracker is a warning; one that failed `max_failures` times in a row is dropped, with another.
    Ctrl-C is no failure.
    """

    def __init__(self, trackers: Sequence[Tracker], max_failures: int = MAX_FAILURES) -> None:
        self.trackers = list(trackers)
        self.max_failures = max_failures
        self._failures: dict[int, int] = {}
        self._warned: set[int] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step))

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        self._each(lambda tracker: tracker.histograms(values, step))

    def images(self, name: str, images: Sequence["Image"], captions: Sequence[str], step: int) -> None:
        self._each(lambda tracker: tracker.images(name, images, captions, step))

    def event(self, kind: str, fields: Mapping[str, Any], step: int) -> None:
        self._each(lambda tracker: tracker.event(kind, fields, step))

    def finish(self, status: str) -> None:
        self._each(lambda tracker: tracker.finish(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:
                self._failed(tracker, error)
            else:
                self._failures.pop(id(tracker), None)

    def _failed(self, tracker: Tracker, error: Exception) -> None:
        name, key = type(tracker).__name__, id(tracker)
        self._failures[key] = self._failures.get(key, 0) + 1
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if self._failures[key] >= self.max_failures:
            self.trackers = [kept for kept in self.trackers if kept is not tracker]
            logger.warning("%s failed %d times in a row and gets no more: %s", name, self._failures[key], reason)
        elif key not in self._warned:
            self._warned.add(key)
            logger.warning("%s failed, the training goes on: %s", name, reason)
