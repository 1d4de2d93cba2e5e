"""`results.jsonl`: what is drawn of many prompts, one line a picture, and what of it a later call can keep.

Owns: the lines, which prompts they finish, whether they are of the same settings. Does not own: drawing and pictures'
files (`gallery`), whole lines (`storage.lines`).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle_torch.log import get_logger
from dalle_torch.storage import atomic_file
from dalle_torch.storage.lines import LinesFile, line_of, repair

logger = get_logger(__name__)

RESULTS = "results.jsonl"

Key = tuple[str, int]
"""A prompt and the seed of its first picture."""
Row = dict[str, Any]

_TYPES: dict[str, type] = {"prompt": str, "seed": int, "first_seed": int, "file": str, "rank": int, "settings": dict}


class Results:
    """The lines in `folder`: those of prompts that are finished are kept, all others go.

    A prompt is finished if it has `pictures` lines, ranks from 1 up, and their files are there.

    Args:
        folder: where `results.jsonl` is, or will be.
        settings: what decides pictures and scores, the same for all lines.
        pictures: lines that a prompt has.
        overwrite: forget what is there.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the lines there are of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], pictures: int, *, overwrite: bool = False) -> None:
        self.folder, self.pictures = folder, pictures
        # As they will be read back.
        self.settings: dict[str, Any] = json.loads(line_of(settings))
        self.finished: dict[Key, list[Row]] = {}
        path = folder / RESULTS
        if overwrite:
            path.unlink(missing_ok=True)
        repair(path)
        self._read(path)
        self._lines = LinesFile(path)

    def add(self, key: Key, rows: Sequence[Row]) -> None:
        """Keep the lines of a prompt whose pictures are written."""
        self._lines.append(*(row | {"settings": self.settings} for row in rows))
        self.finished[key] = list(rows)

    def close(self) -> None:
        self._lines.close()
        if not self._lines.path.stat().st_size:
            self._lines.path.unlink()

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        with path.open(encoding="utf-8", errors="replace") as lines:
            for row in _rows(lines):
                self._check(row.pop("settings"), path)
                self.finished.setdefault((row["prompt"], row["first_seed"]), []).append(row)
        self.finished = {key: rows for key, rows in self.finished.items() if self._is_whole(rows)}
        kept = sum(map(len, self.finished.values()))
        with path.open("rb") as file:
            written = sum(1 for _ in file)
        if kept != written:
            with atomic_file(path) as place, place.open("w", encoding="utf-8") as file_out:
                for rows in self.finished.values():
                    file_out.writelines(line_of(row | {"settings": self.settings}) + "\n" for row in rows)

    def _check(self, settings: dict[str, Any], path: Path) -> None:
        names = sorted(settings.keys() | self.settings.keys())
        other = [name for name in names if settings.get(name) != self.settings.get(name)]
        if other:
            told = ", ".join(f"{name} {settings.get(name)!r} and not {self.settings.get(name)!r}" for name in other)
            raise ValueError(
                f"{path} is of other settings ({told}): name another --output, or begin anew with --overwrite"
            )

    def _is_whole(self, rows: Sequence[Row]) -> bool:
        ranks = [row["rank"] for row in rows]
        return ranks == list(range(1, self.pictures + 1)) and all((self.folder / row["file"]).is_file() for row in rows)


def _rows(lines: Iterable[str]) -> Iterator[Row]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in _TYPES.items()):
            yield row
        else:
            logger.warning("a line of %s is damaged: what it was about is drawn again", RESULTS)
