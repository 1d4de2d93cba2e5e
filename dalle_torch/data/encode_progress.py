"""How far encoding has come: a bar where there is a terminal, a line every half minute elsewhere.

Owns: images a second and the time left, by the bytes of the input. Does not own: bars (`log`).
"""

import time
from collections.abc import Sequence
from typing import Final, Self

from dalle_torch.data.sources import Part
from dalle_torch.log import get_logger, progress

logger = get_logger(__name__)

REPORT_SECONDS: Final = 30.0


class EncodeProgress:
    """A bar where there is a terminal, a line every half minute elsewhere: images, images a second, time left."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._finished = 0
        self._total = sum(part.weight for part in parts)
        self._done = 0.0
        self._started = self._reported = time.monotonic()
        self._images = 0
        self._bar = progress(total=int(self._total), desc="encoding", unit="B")
        self._bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left{postfix}"
        self._bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, part: Part, images: int) -> None:
        """`images` more of `part` are encoded."""
        self._images += images
        now = time.monotonic()
        spent = max(now - self._started, 1e-9)
        done = self._done + min(part.position, part.weight)
        images_a_second = self._images / spent
        speed = (
            f"{self._finished} of {len(self._parts)} shards, {self._images:,} images, {images_a_second:.1f} images/s"
        )
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update(int(done) - self._bar.n)
        if self._bar.disable and now - self._reported > REPORT_SECONDS and done:
            self._reported = now
            left = spent * (self._total - done) / done
            logger.info("%s, about %s left", speed, f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s")

    def finish(self, part: Part) -> None:
        self._finished += 1
        self._done += part.weight
        self._bar.refresh()
