"""The checkpoints of a run: saved by all of its processes, kept and removed, and the newest whole one found again.

Owns: names and attempts, committing together, asynchronous saves, retention, leftovers. Does not own: the files of one
checkpoint (`writing`, `reading`), what is in it and when it is saved (`training`).

A checkpoint is `step-00001000`, or `step-00001000-1` and so on where one of that step was there already: that one goes
only after the new one is committed. What was never committed is no checkpoint, and removed at the next save.
"""

import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from torch import Tensor

from dalle_torch.checkpoint.index import Stack
from dalle_torch.checkpoint.reading import MARKER, Checkpoint, check_files, only_ours
from dalle_torch.checkpoint.store import Store
from dalle_torch.checkpoint.writing import Offer, Place, Save
from dalle_torch.log import get_logger
from dalle_torch.storage import CheckpointError

logger = get_logger(__name__)

_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_UNFINISHED = re.compile(r"\.saving-step-(\d{8,})(?:-(\d+))?-[0-9a-f]{8}")


def nothing() -> None:
    """A barrier of one process."""


class CheckpointFolder:
    """A folder of checkpoints, on a local disk or behind an fsspec URL.

    Args:
        url: the folder, made by the first save; the same place for all processes.
        host_index, host_count: of the processes that save and load together.
        barrier: returns when all processes have come to it.
        gather: gives every process what each passed, in their order; small, and able to be pickled.
        keep: newest checkpoints that stay.
        keep_every: checkpoints of steps that are a multiple of it stay too.

    Raises:
        ValueError: an argument is out of range, or the URL cannot be understood.
    """

    def __init__(
        self,
        url: str,
        *,
        host_index: int = 0,
        host_count: int = 1,
        barrier: Callable[[], None] = nothing,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        keep: int = 2,
        keep_every: int | None = None,
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep={keep} and keep_every={keep_every} must be at least 1")
        if not 0 <= host_index < host_count:
            raise ValueError(f"host_index={host_index} must lie in [0, {host_count})")
        self._store = Store(url)
        self.url = self._store.url
        self._host, self._count = host_index, host_count
        self._barrier, self._gather = barrier, gather
        self._keep, self._keep_every = keep, keep_every
        self._was_there = self._store.local and self._store.exists()
        self._running: tuple[int, threading.Thread, list[BaseException]] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        host_meta: Mapping[str, Any] = {},
        *,
        stacks: Sequence[Stack] = (),
        asynchronous: bool = False,
    ) -> None:
        """Write a checkpoint and commit it; every process calls it, with the same step and names.

        Args:
            step: number of updates done.
            tensors: flat; what is replicated is written by process 0, of DTensors and torch_xla's each process writes
                parts that it holds.
            meta: what is not a tensor, as JSON; that of process 0 is kept.
            host_meta: the same of each process.
            stacks: tensors in which more of what is saved lies together; they are written as they lie, block by block.
            asynchronous: copy to the host's memory and return; a thread writes. The next `save` or `wait` tells of its
                errors. A process that ends waits for the thread.

        Raises:
            OSError: it cannot be written, here or in another process, and is not there; older ones are as they were.
            ValueError: tensors or meta are none, or differ between processes.
        """
        self.wait()
        save = self._begin(step, tensors, meta, host_meta, stacks)
        if asynchronous:
            self._attempt(step, save.stage)
            errors: list[BaseException] = []
            thread = threading.Thread(target=self._behind, args=(save, errors), name="checkpoint", daemon=False)
            self._running = (step, thread, errors)
            thread.start()
            return
        try:
            self._attempt(step, save.write)
            self._attempt(step, lambda: self._finish(save) if self._host == 0 else None)
        except BaseException:
            self._drop(save)
            raise

    def wait(self) -> None:
        """Return when no save is going on; every process calls it.

        Raises:
            OSError: an asynchronous save failed, here or in another process.
        """
        if self._running is None:
            return
        step, thread, errors = self._running
        thread.join()
        self._running = None
        self._agree(step, errors[0] if errors else None)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; whether they are whole is not looked at."""
        return sorted({step for step, _, _ in self._committed()})

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of that step, which `steps` names.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it is damaged.
            OSError: it cannot be read.
        """
        names = [name for found, _, name in self._committed() if found == step]
        if not names:
            raise FileNotFoundError(f"{self.url} has no checkpoint of step {step}")
        return Checkpoint(self._store, names[-1], self._barrier)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is committed and whole; each newer thing is logged in a line that says why not it.

        Raises:
            OSError: the folder cannot be read; that is no reason to take an older one.
        """
        found = [(int(match[1]), int(match[2] or 0), name, True) for name, match in self._named(_NAME)]
        found += [(int(match[1]), int(match[2] or 0), name, False) for name, match in self._named(_UNFINISHED)]
        for step, _, name, named in sorted(found, reverse=True):
            try:
                if not named:
                    raise CheckpointError(f"{self.url}/{name} was never finished")
                checkpoint = Checkpoint(self._store, name, self._barrier)
                if checkpoint.step != step:
                    raise CheckpointError(f"{self.url}/{name} says that it is of step {checkpoint.step}")
                return checkpoint
            except (CheckpointError, FileNotFoundError) as error:
                if self._host == 0:
                    logger.warning("the checkpoint %s is skipped: %s", name, error)
        return None

    # The steps of a save -------------------------------------------------------------------------------------------

    def _begin(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        host_meta: Mapping[str, Any],
        stacks: Sequence[Stack],
    ) -> Save:
        """Everything up to where processes go their own ways; what fails in one fails in all."""
        found: list[Any] = []
        offer: Offer | None = None
        error: BaseException | None = None
        place: Place | None = None
        try:
            save = Save(self._store, self._host, tensors, meta, host_meta, stacks)
            place = self._open(step) if self._host == 0 else None
            offer = save.offer(place)
        except Exception as caught:
            error = caught
        found = self._gather((offer, None if error is None else _reason(error)))
        try:
            self._raise(step, error, [reason for _, reason in found])
            save.agree([offer for offer, _ in found])
        except BaseException:
            if place is not None:
                self._remove(place.folder)
            raise
        return save

    def _open(self, step: int) -> Place:
        """Of process 0: clear away what killed saves have left, and make the place of a new one."""
        if self._was_there and not self._store.exists():
            raise FileNotFoundError(f"{self.url}: the folder was there, and has gone")
        committed = {name for _, _, name in self._committed()}
        for pattern in (_UNFINISHED, _NAME):
            for name, _ in self._named(pattern):
                if name not in committed and only_ours(self._store.files(name)):
                    self._store.remove(name, MARKER)
        taken = {name for name, _ in self._named(_NAME)}
        attempts = [int(match[2] or 0) for name, match in self._named(_NAME) if int(match[1]) == step]
        final = f"step-{step:08d}" + (f"-{max(attempts) + 1}" if attempts else "")
        assert final not in taken
        token = secrets.token_hex(4)
        folder = f".saving-{final}-{token}" if self._store.local else final
        self._store.make(folder)
        self._was_there = self._store.local
        return Place(step, folder, final, token)

    def _finish(self, save: Save) -> None:
        """Of process 0, when all have written."""
        save.commit(self._count)
        try:
            self._retire(save.place)
        except OSError as error:
            # The new one is safe; what could not be removed is tried again after the next one.
            logger.warning("%s: old checkpoints could not be removed: %s", self.url, _reason(error))

    def _behind(self, save: Save, errors: list[BaseException]) -> None:
        """What the thread of an asynchronous save does; it asks nothing of `gather`, which the training uses."""
        try:
            save.write()
            if self._host == 0:
                save.wait_for_others(self._count)
                self._finish(save)
        except BaseException as error:
            errors.append(error)
            logger.warning("the checkpoint of step %d was not written: %s", save.place.step, _reason(error))
            self._drop(save)

    def _attempt(self, step: int, action: Callable[[], Any]) -> None:
        """Do it, and raise in every process if it failed in one."""
        error: BaseException | None = None
        try:
            action()
        except Exception as caught:
            error = caught
        self._agree(step, error)

    def _agree(self, step: int, error: BaseException | None) -> None:
        self._raise(step, error, self._gather(None if error is None else _reason(error)))

    def _raise(self, step: int, error: BaseException | None, reasons: list[str | None]) -> None:
        if isinstance(error, ValueError) and not isinstance(error, CheckpointError):
            raise error
        if error is not None:
            self._fail(step, _reason(error), error)
        for process, reason in enumerate(reasons):
            if reason is not None:
                self._fail(step, f"process {process} of {self._count}: {reason}", None)

    def _fail(self, step: int, reason: str, cause: BaseException | None) -> NoReturn:
        raise OSError(
            f"{self.url}: the checkpoint of step {step} could not be written ({reason}); the earlier ones are as they "
            "were: make room or the folder writable there, or set checkpoint.folder to another place"
        ) from cause

    def _drop(self, save: Save) -> None:
        """Of process 0: take away what a failed save has written, as far as that goes."""
        if self._host == 0 and not save.committed:
            self._remove(save.place.folder)

    def _remove(self, folder: str) -> None:
        with suppress(Exception):
            self._store.remove(folder, MARKER)

    # What is there -------------------------------------------------------------------------------------------------

    def _named(self, pattern: re.Pattern[str]) -> list[tuple[str, re.Match[str]]]:
        return [(name, match) for name in self._store.folders() if (match := pattern.fullmatch(name))]

    def _committed(self) -> list[tuple[int, int, str]]:
        """Step, attempt and name of each folder that has a marker, ascending."""
        return sorted(
            (int(match[1]), int(match[2] or 0), name)
            for name, match in self._named(_NAME)
            if MARKER in self._store.files(name)
        )

    def _retire(self, place: Place) -> None:
        """Remove what is no longer to be kept, the oldest first.

        Damaged ones do not count among those that stay, and those of later steps are not touched: a run that goes on
        from before them has found them damaged, and its first save must not fall victim to them.
        """
        kept = 0
        seen: set[int] = set()
        doomed = []
        for step, _, name in reversed(self._committed()):
            if step > place.step:
                continue
            latest = name == place.final or step not in seen | {place.step}
            seen.add(step)
            if latest and kept < self._keep and (name == place.final or self._is_whole(name)):
                kept += 1
            elif not (latest and self._keep_every is not None and step % self._keep_every == 0):
                doomed.append(name)
        for name in reversed(doomed):
            self._store.remove(name, MARKER)

    def _is_whole(self, name: str) -> bool:
        with suppress(CheckpointError, FileNotFoundError):
            check_files(self._store, name)
            return True
        return False


def _reason(error: BaseException) -> str:
    """What an error says, with torch's own wrapped around it left out."""
    while not isinstance(error, (OSError, ValueError)) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{error}".split())[:500] or type(error).__name__
