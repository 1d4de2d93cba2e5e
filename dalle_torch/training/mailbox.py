"""Requests to a run on their way: files in a folder that both sides reach.

Owns: the files. Does not own: what they say (`requests`).

    control/ID.json             a request
    control/done/ID.json        its answer
    control/rejected/NAME       what is no request, and NAME.reason beside it
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dalle_torch.log import get_logger
from dalle_torch.storage.places import Place
from dalle_torch.training.requests import Change, Request

logger = get_logger(__name__)

_SUFFIX = ".json"
_MAX_BYTES = 1 << 16
_REMOTE_SECONDS = 5.0
_MAX_PAUSE = 300.0


@dataclass(frozen=True)
class Answer:
    """What became of a request: its changes (none, where all of it held already or it was a word), or the reason
    against it."""

    id: str
    changes: tuple[Change, ...]
    error: str | None
    step: int | None
    """Updates done when it was answered."""

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Answer":
        changes = tuple(Change.from_json(change) for change in row["changes"])
        return cls(str(row["id"]), changes, row["error"], row["step"])


class Mailbox:
    """The folders in which requests to one run arrive.

    Nothing but `send` and `cancel` raises for what disks and networks do: a run is not to stop over it.

    Args:
        folders: paths or URLs; `send` takes the first one, `pending` looks in all.
        remote_seconds: shortest time between two looks into a folder behind a URL. After a failure it grows.

    Raises:
        ValueError: a URL of a kind that nothing here reads.
    """

    def __init__(
        self,
        folders: Sequence[str],
        remote_seconds: float = _REMOTE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not folders:
            raise ValueError("a mailbox needs a folder")
        self._inboxes = [_Inbox(Place(folder), remote_seconds, clock) for folder in dict.fromkeys(folders)]
        self._from: dict[str, _Inbox] = {}

    def send(self, request: Request) -> str:
        """Put a request there, whole or not at all; returns its id. Raises OSError."""
        data = json.dumps(request.to_json(), indent=1).encode()
        self._inboxes[0].place.write(request.id + _SUFFIX, data)
        return request.id

    def pending(self) -> list[Request]:
        """All requests that wait for an answer, the oldest first; what is none is moved to `rejected`."""
        found: dict[str, Request] = {}
        for inbox in self._inboxes:
            for request in inbox.look():
                if request.id not in found:
                    found[request.id] = request
                    self._from[request.id] = inbox
        return [found[key] for key in sorted(found)]

    def done(self, request: Request, result: Sequence[Change] | str, step: int | None = None) -> None:
        """Answer a request, with its changes or with the reason against it, and take it away."""
        error, changes = (result, []) if isinstance(result, str) else (None, list(result))
        answer = {
            "id": request.id, "step": step, "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "changes": [change.to_json() for change in changes], "error": error,
        }  # fmt: skip
        self._from.get(request.id, self._inboxes[0]).answer(request.id, answer)

    def answer(self, request_id: str) -> Answer | None:
        """The answer to a request, where there is one."""
        for inbox in self._inboxes:
            try:
                row = json.loads(inbox.done.read(request_id + _SUFFIX, _MAX_BYTES))
                return Answer.from_json(row)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.debug("%s: no answer to be read: %s", inbox.place, error)
        return None

    def cancel(self) -> list[str]:
        """Take away all requests that wait; returns their ids. Raises OSError."""
        removed = []
        for inbox in self._inboxes:
            for name in inbox.place.names():
                if name.endswith(_SUFFIX):
                    inbox.place.remove(name)
                    removed.append(name.removesuffix(_SUFFIX))
        return sorted(removed)


class _Inbox:
    """One folder of a mailbox."""

    def __init__(self, place: Place, remote_seconds: float, clock: Callable[[], float]) -> None:
        self.place = place
        self.done = place / "done"
        self.pause = self.shortest = remote_seconds if place.is_remote else 0.0
        self.clock = clock
        self.looked: float | None = None
        # What could not be moved or removed: it is not looked at again.
        self.handled: set[str] = set()
        self.requests: dict[str, Request] = {}

    def look(self) -> list[Request]:
        now = self.clock()
        if self.looked is not None and now - self.looked < self.pause:
            return []
        self.looked = now
        try:
            names = self.place.names()
        except OSError as error:
            if self.pause == self.shortest:
                logger.warning("%s cannot be looked into, adjustments have to wait: %s", self.place, error)
            self.pause = min(max(2 * self.pause, 1.0), _MAX_PAUSE)
            return []
        self.pause = self.shortest
        self.requests = {name: request for name, request in self.requests.items() if name in names}
        return [request for name in names if (request := self._request(name)) is not None]

    def _request(self, name: str) -> Request | None:
        if name in self.handled:
            return None
        if name not in self.requests:
            try:
                self.requests[name] = self._read(name)
            except FileNotFoundError:
                return None
            except OSError as error:
                logger.warning("%s/%s cannot be read: %s", self.place, name, error)
                self.handled.add(name)
                return None
            except (ValueError, RecursionError) as error:
                self._reject(name, " ".join(str(error).split()))
                return None
        return self.requests[name]

    def _read(self, name: str) -> Request:
        if not name.endswith(_SUFFIX):
            raise ValueError(f"requests are files {_SUFFIX}")
        data = self.place.read(name, _MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"a request has at most {_MAX_BYTES} bytes")
        request = Request.from_json(json.loads(data))
        if request.id + _SUFFIX != name:
            raise ValueError(f"id={request.id} is not the file's name")
        return request

    def _reject(self, name: str, reason: str) -> None:
        logger.warning("%s/%s is no request and was moved to rejected: %s", self.place, name, reason)
        self.handled.add(name)
        try:
            self.place.move(name, f"rejected/{name}")
            self.place.write(f"rejected/{name}.reason", f"{reason}\n".encode())
            self.handled.discard(name)
        except OSError as error:
            logger.warning("%s/%s cannot be moved, it is passed over from now on: %s", self.place, name, error)

    def answer(self, request_id: str, answer: Mapping[str, Any]) -> None:
        name = request_id + _SUFFIX
        self.handled.add(name)
        try:
            self.done.write(name, json.dumps(answer, indent=1).encode())
            self.place.remove(name)
        except OSError as error:
            logger.warning("%s/%s was done, but that cannot be written there: %s", self.place, name, error)
