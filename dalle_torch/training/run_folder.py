"""The folder of a run: what lies where in it, and that one process alone works in it.

Owns: paths, the lock, what differs between the configurations of a run and of its resumption. Does not own: what the
files say (`config_io`, `tracking`, `control`, `checkpoint`).
"""

import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dalle_torch.log import get_logger

logger = get_logger(__name__)

_TRIES, _PAUSE = 10, 0.02
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunFolderError(OSError):
    """A folder that this run cannot have: not writable, or in use."""


@dataclass(frozen=True)
class Holder:
    """The process that works in a run's folder; `pid` 0 where it did not say so."""

    pid: int = 0
    host: str = "unknown"
    time: str = "unknown"

    def __str__(self) -> str:
        return f"process {self.pid or 'unknown'} on {self.host}, since {self.time}"


class RunFolder:
    """Where the files of a run are; nothing is read or written before `acquire`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.history = self.path / "history.jsonl"
        self.lock = self.path / "run.lock"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.processor = self.path / "processor"
        self.control = self.path / "control"

    def create(self) -> None:
        """Make the folders that every run has.

        Raises:
            RunFolderError: something is in the way, or it cannot be written to.
        """
        try:
            for folder in (self.path, self.samples, self.checkpoints, self.control):
                folder.mkdir(parents=True, exist_ok=True)
            # Permissions do not tell of read-only disks, quotas and network folders; a file does.
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"\n")
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunFolderError(
                f"{self.path} cannot be the folder of a run ({reason}): name one that can be made and written to"
            ) from error

    def acquire(self) -> "RunLock":
        """Create the folder and keep it for this process until the lock is released or the process ends, however.

        Raises:
            RunFolderError: another process has it, or it cannot be written to.
        """
        self.create()
        return RunLock(self.lock)

    def holder(self) -> Holder | None:
        """The process that works in the folder now; None: there is none, or nothing can be told here."""
        try:
            file = self.lock.open("rb")
        except OSError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _holder(file.read())
            except OSError:
                return None
            return None


class RunLock:
    """A run's folder is this process's own. A context manager; the kernel releases it with a process that is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written ({error.strerror or error}): see who owns it") from error
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        # A child that was forked, such as a loader's worker, must not keep the lock of a parent that was killed.
        self._owner = os.getpid()
        os.register_at_fork(after_in_child=self._file.close)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder back; again is fine."""
        if not self._file.closed and os.getpid() == self._owner:
            self._file.truncate(0)
            self._file.close()

    def _take(self) -> None:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # Someone who asks `holder` has it for a moment too.
                if not left:
                    self._file.seek(0)
                    raise RunFolderError(
                        f"{self.path.parent} is in use by {_holder(self._file.read())}: wait for it, stop it with "
                        f"`dalle-torch adjust {self.path.parent} stop`, or name another folder"
                    ) from error
                time.sleep(_PAUSE)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                logger.warning("%s: no locks on this file system, so see to it that no other run is here", self.path)
                break
        holder = Holder(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
        self._file.truncate(0)
        self._file.write(json.dumps(asdict(holder)).encode() + b"\n")


def _holder(data: bytes) -> Holder:
    try:
        found = json.loads(data)
        return Holder(int(found["pid"]), str(found["host"]), str(found["time"]))
    except (ValueError, KeyError, TypeError):
        return Holder()


@dataclass(frozen=True)
class Difference:
    """An option that two configurations do not agree on; sections that only one has are dicts."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.old!r} -> {self.new!r}"


def differences(old: Any, new: Any, prefix: str = "") -> list[Difference]:
    """The options that differ between two configurations of one class, by dotted name, in the order of the fields."""
    found = []
    for name, before, after in _pairs(old, new):
        dotted = f"{prefix}{name}"
        both = (is_dataclass(before) and type(before) is type(after)) or (
            isinstance(before, Mapping) and isinstance(after, Mapping)
        )
        if both:
            found += differences(before, after, f"{dotted}.")
        elif before != after:
            found.append(Difference(dotted, _plain(before), _plain(after)))
    return found


def _pairs(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(old, Mapping):
        return [(str(name), old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]
    return [(field.name, getattr(old, field.name), getattr(new, field.name)) for field in fields(old)]


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
