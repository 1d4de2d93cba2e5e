"""What a sample says beside its picture: captions, fields, names; each read as the untrusted text that it is.

Owns: which value is the caption, bounds, the reasons for which text is refused. Does not own: where it comes from
(`sources`, `tokens`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

MAX_CAPTION_BYTES: Final = 1 << 16
MAX_JSON_BYTES: Final = 1 << 20
CAPTION_KEYS: Final = ("caption", "text")
"""Looked for, in this order, where no key is given."""

NO_CAPTION: Final = "no_caption"
NOT_UTF8: Final = "caption_not_utf8"
CAPTION_TOO_LONG: Final = "caption_too_long"
BAD_JSON: Final = "bad_json"

_PROBED = 100
"""Samples without the key that was asked for, after which there is none."""
_MAX_FIELDS, _MAX_FIELD_NAME, _MAX_FIELD_LENGTH = 64, 64, 1024


def read_caption(value: Any) -> tuple[str, str]:
    """(caption, "") or ("", reason); of a list the first caption is taken."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return "", NOT_UTF8
    if not isinstance(value, str):
        return "", NO_CAPTION
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        # Halves of a UTF-16 pair, which JSON lets through.
        return "", NOT_UTF8
    value = value.strip()
    if not value:
        return "", NO_CAPTION
    return (value, "") if size <= MAX_CAPTION_BYTES else ("", CAPTION_TOO_LONG)


def plain_fields(values: Mapping[str, Any], caption_key: str | None) -> dict[str, Any]:
    """The numbers, truth values and short strings of `values`, captions left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if len(found) == _MAX_FIELDS:
            break
        if key not in (*CAPTION_KEYS, caption_key) and len(key) <= _MAX_FIELD_NAME and _is_plain(value):
            found[key] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_FIELD_LENGTH
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


class KeyWatch:
    """Notices that the caption key that was asked for is nowhere in the input; one watches all its parts.

    Once any sample had the key, those that lack it merely have no caption.
    """

    def __init__(self, key: str | None) -> None:
        self.key = key
        self.found = False
        """Whether a sample had the key, or a parquet file its column."""
        self.seen = 0
        self._url = ""
        self._names: list[str] = []

    @property
    def content(self) -> bool:
        """Whether nothing is left to be looked for."""
        return self.key is None or self.found

    def saw(self, values: Mapping[str, Any] | None, url: str) -> None:
        """Look at the fields of one more sample; None: it has no JSON. Raises as `check` once enough lack the key."""
        if self.content:
            return
        self.found = values is not None and self.key in values
        self.seen += 1
        self._url = self._url or url
        self._names = self._names or [str(name) for name in values or ()]
        if self.seen >= _PROBED:
            self.check()

    def check(self) -> None:
        """Raises ValueError where samples were seen and none had the key."""
        if self.seen and not self.content:
            has = f"the keys it has: {', '.join(self._names[:20])}" if self._names else "its samples have no JSON"
            hint = "" if self._names else "; without --caption-key captions are taken from txt"
            raise ValueError(f"{self._url}: no sample has the caption key {self.key}; {has}{hint}")


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object that `data` is, or None."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def first_of(values: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first key that is there, or None."""
    return next((values[key] for key in keys if key in values), None)


def safe_key(key: str) -> str:
    """A sample's name that leads nowhere when somebody unpacks the archive, and has no dot, where extensions begin."""
    pieces = [piece.replace(".", "_").replace("\\", "_") for piece in key.split("/")]
    folders = [piece for piece in pieces[:-1] if piece.strip("_")]
    # Names that begin with two underscores are passed over by readers of webdataset.
    name = "_" + pieces[-1].lstrip("_") if pieces[-1].startswith("__") else pieces[-1]
    return "/".join([*folders, name or "_"])
