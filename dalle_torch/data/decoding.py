"""Pictures decoded ahead of the network: one thread reads the input, a pool decodes, order is kept.

Owns: threads, the bound on what is in flight, which failures cost a sample and which end the run. Does not own:
reading (`sources`), pixels (`images`).
"""

import errno
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from dalle_torch.data.images import TOO_LARGE, BadImage, decode_square
from dalle_torch.data.sources import NO_IMAGE, FileTooLarge, Part, RawSample, Skip
from dalle_torch.data.text import TextEncoder
from dalle_torch.data.token_shard import PicturedSample, text_members

Outcome = PicturedSample | Skip | None
"""A sample, one that is left out, or None at the end of a part."""

_NAMES_NO_FILE: Final = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""What a name that leads to no file gives, which is the sample's fault; all else is the file system's."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A raw sample to one that is ready for the network."""

    resolution: int
    max_pixels: int
    text: TextEncoder | None

    def __call__(self, sample: RawSample, source: str) -> PicturedSample | Skip:
        """Decode one sample.

        Raises:
            OSError: a picture behind a name could not be read for a reason that is not the sample's.
        """
        try:
            data = sample.image if isinstance(sample.image, bytes) else sample.image()
        except FileTooLarge as error:
            return Skip(sample.key, TOO_LARGE, str(error))
        except (OSError, ValueError) as error:
            if not _names_no_file(error):
                raise
            return Skip(sample.key, NO_IMAGE, str(error))
        try:
            picture, size = decode_square(data, self.resolution, self.max_pixels)
        except BadImage as error:
            return Skip(sample.key, error.reason, str(error))
        return PicturedSample(sample.key, picture, text_members(sample, source, size, self.text))


def _names_no_file(error: BaseException) -> bool:
    """Whether the error, or what it was raised from, says that a name leads to no file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            # A package that is missing here is missing for all samples.
            return False
        if isinstance(cause, FileNotFoundError) or (isinstance(cause, OSError) and cause.errno in _NAMES_NO_FILE):
            return True
        cause = cause.__cause__
    return isinstance(error, ValueError)


@contextmanager
def decoded(parts: Sequence[Part], decoder: Decoder, threads: int, ahead: int) -> Iterator[Iterator[Outcome]]:
    """All samples of `parts` in order; None ends each part.

    Args:
        threads: that decode, beside the one that reads.
        ahead: samples in flight, which bounds the memory; reading goes on across the end of a part.
    """
    waiting: queue.Queue[Future[PicturedSample | Skip] | Skip | BaseException | None] = queue.Queue(ahead)
    stop = threading.Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def put(item: Future[PicturedSample | Skip] | Skip | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for part in parts:
                for item in part.samples():
                    task = item if isinstance(item, Skip) else pool.submit(decoder, item, part.source)
                    if not put(task):
                        return
                put(None)
        except BaseException as error:
            put(error)

    reader = threading.Thread(target=read, name="read", daemon=True)
    reader.start()
    try:
        yield _results(waiting)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        reader.join(timeout=5)


def _results(waiting: "queue.Queue[Future[PicturedSample | Skip] | Skip | BaseException | None]") -> Iterator[Outcome]:
    while True:
        item = waiting.get()
        if isinstance(item, BaseException):
            raise item
        yield item.result() if isinstance(item, Future) else item
