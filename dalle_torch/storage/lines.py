"""Files of one JSON value a line, which a process can be killed over at any moment.

Owns: appending whole lines, repairing a torn last one, reading. Does not own: what the lines say.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dalle_torch.storage.atomic import atomic_file


class LinesFile:
    """A file that grows by whole lines; a last line without its end, of a process that was killed, is cut off.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        repair(self.path)
        self._file = self.path.open("ab", buffering=0)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write one line for each row, all of them or, where the disk is full, none."""
        data = "".join(line_of(row) + "\n" for row in rows).encode()
        before = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(before)
            raise

    def close(self) -> None:
        self._file.close()


def repair(path: Path) -> None:
    """Cut off what follows the last end of a line."""
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        kept, block = end, 1 << 16
        while kept:
            start = max(0, kept - block)
            file.seek(start)
            found = file.read(kept - start).rfind(b"\n")
            if found >= 0:
                kept = start + found + 1
                break
            kept = start
        if kept != end:
            file.truncate(kept)


def line_of(row: Mapping[str, Any]) -> str:
    """`row` as JSON on one line. Numbers that are not finite have no JSON: they become null, so that a column of
    numbers stays one, and `nonfinite` says what they were."""
    odd = {name: str(value) for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    row = {name: finite(value) for name, value in row.items()}
    row |= {"nonfinite": odd} if odd else {}
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
    if any("\ud800" <= char <= "\udfff" for char in line):
        # Half a UTF-16 pair, which no file can hold.
        line = json.dumps(row, allow_nan=False, default=str)
    return line


def finite(value: Any) -> Any:
    """`value` with null for every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The rows in `text`; lines that are no JSON object are left out."""
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def set_aside(path: Path, aside: Path, lines: Iterable[bytes], kept: Iterable[bytes]) -> None:
    """Move `lines` of `path` to the end of `aside` and leave `kept`; killed at any moment, no line is lost or doubled.

    Args:
        lines, kept: with their ends.
    """
    moved = b"".join(lines)
    repair(aside)
    # A kill after they were appended and before `path` was written anew leaves them as the end of `aside`.
    if not (aside.is_file() and aside.read_bytes().endswith(moved)):
        with aside.open("ab") as file:
            file.write(moved)
            file.flush()
            os.fsync(file.fileno())
    with atomic_file(path) as place:
        place.write_bytes(b"".join(kept))
