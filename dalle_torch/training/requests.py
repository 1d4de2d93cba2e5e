"""Requests to a run that goes, and the changes that come of them.

Owns: what a request is, its checks, its form as JSON. Does not own: its way (`mailbox`), what has been applied
(`history`), the settings (`adjustable`).
"""

import getpass
import re
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from dalle_torch.config import RunConfig
from dalle_torch.training.adjustable import ADJUSTABLE, WORDS, Value, check_change, find, shown, value_of, with_values

_ID = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{8}")
_MAX_TEXT = 200


@dataclass(frozen=True)
class Change:
    """A setting that was changed.

    Attributes:
        name: dotted, a key of `ADJUSTABLE`.
        old, new: its values.
        step: the change was made right before the update of that number, counted from 0; None: it was not yet.
        time: when it was applied, or asked for before that; UTC, ISO 8601.
        id: of the request.
        by: who sent it, user@host.
    """

    name: str
    old: Value
    new: Value
    step: int | None
    time: str
    id: str
    by: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Change":
        """Raises ValueError: `row` is no change that was applied, or of a setting that cannot be changed."""
        try:
            setting, step = find(row["name"]), row["step"]
            if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
                raise ValueError(f"step={step} is not a number of updates")
            old, new = setting.check(row["old"]), setting.check(row["new"])
            return cls(setting.name, old, new, step, *(_text(row, key) for key in ("time", "id", "by")))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        when = "" if self.step is None else f"step {self.step}: "
        return f"{when}{self.name} {shown(self.old)} -> {shown(self.new)}"


@dataclass(frozen=True)
class Request:
    """What one user wants of a run.

    Attributes:
        settings: new values by dotted name.
        words: any of `WORDS`.
        id: unique; ids sort by the time of sending.
        time: of sending; UTC, ISO 8601.
        by: user@host.
        unchanged: what was asked for and holds already, in words; not sent.
    """

    settings: Mapping[str, Value]
    words: tuple[str, ...]
    id: str
    time: str
    by: str
    unchanged: tuple[str, ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "time": self.time, "by": self.by,
            "settings": dict(self.settings), "words": list(self.words),
        }  # fmt: skip

    @classmethod
    def from_json(cls, row: object) -> "Request":
        """Raises ValueError: `row` is no request; the reason is in the words of what it should be."""
        if not isinstance(row, Mapping):
            raise ValueError("a request is a JSON object")
        unknown = set(row) - {"id", "time", "by", "settings", "words"}
        settings, words = row.get("settings"), row.get("words")
        if unknown or not isinstance(settings, Mapping) or not isinstance(words, list) or not (settings or words):
            raise ValueError("a request has id, time, by, settings (name: value) and words, and asks for something")
        if not all(isinstance(word, str) and word in WORDS for word in words):
            raise ValueError(f"words={words} are not of {', '.join(WORDS)}")
        if wrong := [name for name in settings if name not in ADJUSTABLE]:
            raise ValueError(f"{', '.join(map(repr, wrong))} cannot be adjusted while a run goes")
        values = {name: ADJUSTABLE[name].check(value) for name, value in settings.items()}
        request = cls(values, tuple(words), _text(row, "id"), _text(row, "time"), _text(row, "by"))
        if not _ID.fullmatch(request.id):
            raise ValueError(f"id={request.id!r} is none of a request")
        return request


def parse_request(words: Sequence[str], config: RunConfig) -> Request:
    """The request that a user typed.

    Args:
        words: "name=value" with dotted or short names, "save", "stop".
        config: of the run as it is now, with all changes so far.

    Raises:
        ValueError: an unknown name, a value of the wrong type or out of bounds, a setting that the run does not have or
            cannot change, one named twice, or nothing that would change.
    """
    settings: dict[str, Value] = {}
    asked: list[str] = []
    unchanged: list[str] = []
    for word in words:
        name, equals, text = word.partition("=")
        if not equals and name in WORDS:
            asked += [] if name in asked else [name]
            continue
        setting = find(name.strip())
        if not equals:
            raise ValueError(f"{name} needs a value: {name}={shown(value_of(config, setting.name))} is what it has now")
        if setting.name in settings:
            raise ValueError(f"{setting.name} is set twice: leave one out")
        settings[setting.name] = setting.parse(text.strip())
    check_change(config, settings)
    for name in list(settings):
        if value_of(config, name) == settings[name]:
            unchanged.append(f"{name} is {shown(settings.pop(name))} already")
    if not settings and not asked:
        names = "name=value, save or stop"
        raise ValueError(f"nothing to change: {'; '.join(unchanged)}" if unchanged else f"nothing to do: say {names}")
    now = datetime.now(UTC)
    request_id = f"{now:%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(4)}"
    time = now.isoformat(timespec="milliseconds")
    return Request(settings, tuple(asked), request_id, time, _sender(), tuple(unchanged))


def changes_of(request: Request, config: RunConfig, step: int) -> list[Change]:
    """What `request` changes of a run whose configuration is `config` now, right before the update `step`.

    Raises:
        ValueError: it does not fit the run, any more or at all.
    """
    check_change(config, request.settings)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return [
        Change(name, value_of(config, name), value, step, now, request.id, request.by)
        for name, value in request.settings.items()
        if value_of(config, name) != value
    ]


def apply(config: RunConfig, changes: Iterable[Change]) -> RunConfig:
    """`config` after `changes`, of which a later one outweighs an earlier one of the same name. Pure.

    Raises:
        ValueError: the result cannot be used.
    """
    return with_values(config, {change.name: change.new for change in changes})


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise ValueError(f"{key} is not a short text")
    return value


def _sender() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        # A container may run under a number that no user has.
        user = "unknown"
    name = f"{user}@{socket.gethostname()}"
    return "".join(char for char in name if char.isprintable())[:_MAX_TEXT]
