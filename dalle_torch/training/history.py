"""The changes that were made to a run's settings, and when.

Owns: the list, its file, how it is replayed. Does not own: what a change is (`requests`).

A change of step N was made right before the update N, counted from 0. A run that goes on from an older checkpoint makes
it again there, so that it becomes the same run. The exception is a newer wish: where the user changed the same setting
at an earlier step since, what they wanted before is not done any more.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle_torch.config import RunConfig
from dalle_torch.log import get_logger
from dalle_torch.storage.lines import LinesFile, line_of, parse_lines
from dalle_torch.training.requests import Change, apply

logger = get_logger(__name__)


class History:
    """All changes of a run, by step and then time.

    Args:
        path: `history.jsonl` of the run's folder, which is read, and grows; None: memory alone.
        saved: what `to_list` gave a checkpoint. Changes that the file does not have are written to it.

    Raises:
        ValueError: `saved` is no list of changes. Lines of the file that are none are left out, with a warning.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None, saved: Iterable[Mapping[str, Any]] = ()) -> None:
        self._file: LinesFile | None = None
        self._changes: list[Change] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = LinesFile(path)
            self._changes = _sorted(read_history(path.read_bytes(), str(path)))
        self.merge(saved)

    def merge(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Take in the changes of a checkpoint. Raises ValueError."""
        self.record([_applied(row) for row in saved])

    def record(self, changes: Iterable[Change]) -> None:
        """Note changes that are made now; those that are there are left as they are. Raises OSError, ValueError."""
        known = {_key(change) for change in self._changes}
        new = {_key(change): change for change in changes if _key(change) not in known}
        if any(change.step is None for change in new.values()):
            raise ValueError("a change is recorded with the step before which it is made")
        if new and self._file is not None:
            self._file.append(*(change.to_json() for change in new.values()))
        self._changes = _sorted([*self._changes, *new.values()])

    def at(self, step: int) -> list[Change]:
        """What is to be applied right before the update `step`."""
        return [change for change in self._changes if change.step == step and not self._outdated(change)]

    def config_at(self, config: RunConfig, step: int | None = None) -> RunConfig:
        """The configuration of a run that began with `config` when `step` updates are done, without `at(step)`; None:
        after all changes.

        Raises:
            ValueError: a change does not fit `config`, which then is not what the run began with.
        """
        past = [change for change in self._changes if step is None or (change.step or 0) < step]
        past = [change for change in past if not self._outdated(change)]
        try:
            return apply(config, past)
        except ValueError as error:
            names = ", ".join(dict.fromkeys(change.name for change in past))
            raise ValueError(f"the changes made to this run ({names}) do not fit its configuration: {error}") from error

    def has(self, request_id: str) -> bool:
        """Whether the request of that id was applied."""
        return any(change.id == request_id for change in self._changes)

    def of(self, request_id: str) -> list[Change]:
        """The changes of a request."""
        return [change for change in self._changes if change.id == request_id]

    def to_list(self) -> list[dict[str, Any]]:
        """For a checkpoint: all changes, as JSON."""
        return [change.to_json() for change in self._changes]

    def dump(self) -> bytes:
        """The content of its file, for another place that is to have it."""
        return "".join(line_of(row) + "\n" for row in self.to_list()).encode()

    def __iter__(self) -> Iterator[Change]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _outdated(self, change: Change) -> bool:
        return any(
            other.name == change.name and _step(other) < _step(change) and other.time > change.time
            for other in self._changes
        )


def read_history(data: bytes, source: str) -> list[Change]:
    """The changes in the content of a `history.jsonl`; a torn last line and lines that are no changes are left out."""
    whole = data[: data.rfind(b"\n") + 1]
    changes = []
    for row in parse_lines(whole.decode("utf-8", errors="replace")):
        try:
            changes.append(_applied(row))
        except ValueError as error:
            logger.warning("%s has a line that is no change, it is left out: %s", source, error)
    return _sorted(changes)


def _applied(row: Mapping[str, Any]) -> Change:
    change = Change.from_json(row)
    if change.step is None:
        raise ValueError("step is missing")
    return change


def _step(change: Change) -> int:
    assert change.step is not None
    return change.step


def _key(change: Change) -> tuple[str, str, int | None]:
    return change.id, change.name, change.step


def _sorted(changes: Iterable[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: (_step(change), change.time, change.id, change.name))
