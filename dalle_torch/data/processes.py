"""The processes that read for a loader: torch's DataLoader, in our words where something happens to one of them.

torch notices a killed worker in a signal handler, so its error comes up wherever the main process is at that moment: in
the loader, or in the middle of a step of the training. Here it becomes a `WorkerKilled` in both cases.

Owns: starting workers, torch's warnings and errors about them. Does not own: what they do (`worker`).
"""

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

import torch
from torch.utils.data import DataLoader

from dalle_torch.data.worker import Failure, Rows, WorkerStream
from dalle_torch.log import get_logger

logger = get_logger(__name__)

_PREFETCHED: Final = 4
"""Batches that each worker has ready."""
_KILLED: Final = "DataLoader worker"
"""How torch begins to speak of one."""

Handler = Callable[[int, FrameType | None], Any]


class WorkerKilled(ChildProcessError, RuntimeError):
    """A process that read the data is gone; also a RuntimeError, as torch's own is, for other loaders' users."""


def worker_batches(stream: WorkerStream, workers: int) -> Iterator[Rows | Failure]:
    """What each worker has for batch 0, in the order of the workers, then for batch 1 and so on.

    Raises:
        ChildProcessError: a worker was killed; from now on also outside of this iterator, where torch notices it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cores:
        logger.info("workers=%d are more than the cores of this machine: %d", workers, cores)
    with warnings.catch_warnings():
        # The number is the user's choice, and the line above is enough.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        batches: DataLoader[Rows | Failure] = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            prefetch_factor=_PREFETCHED,
            # The loader would draw a seed from torch's own generator, whose state belongs to the training.
            generator=torch.Generator(),
        )
        try:
            running = iter(batches)
        except RuntimeError as error:
            _name(error)
            raise
    _watch()
    while True:
        try:
            part = next(running)
        except StopIteration:
            return
        except RuntimeError as error:
            _name(error)
            raise
        yield part


def _name(error: RuntimeError) -> None:
    """Raises WorkerKilled where `error` is torch's about a worker."""
    if isinstance(error, WorkerKilled) or not str(error).startswith(_KILLED):
        return
    said = " ".join(str(error).split())
    raise WorkerKilled(
        f"one of the workers that read the data was ended from outside ({said:.150}): where memory ran out, use fewer "
        "workers or a smaller shuffle_buffer"
    ) from error


def _watch() -> None:
    """Put our words around torch's handler, once; only the main thread may, and only where there are such signals."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGCHLD)
    if callable(before) and not isinstance(before, _Watch):
        signal.signal(signal.SIGCHLD, _Watch(before))


class _Watch:
    """torch's handler of a child's end, whose error is named."""

    def __init__(self, before: Handler) -> None:
        self._before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._before(number, frame)
        except RuntimeError as error:
            _name(error)
            raise


def _as_it_is(value: Any) -> Any:
    return value


def _start_worker(index: int) -> None:
    # A worker is one core's; the tokenizer's threads would also warn of the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C, and what else is sent to all processes in front, is for the one that uses the batches.
    os.setpgrp()
