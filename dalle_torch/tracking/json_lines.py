"""Metrics as JSON lines, one a log event.

Owns: the form of the lines, and one curve in the file however often a run is killed and resumed. Does not own: whole
lines (`storage.lines`).

Every line has `step` and `time` (UTC, ISO 8601). Beside them a line has numbers by name; or `histograms`, by name, with
`counts`, `edges` and `norm` each; or `images`, a name, with `captions` and `files`; or `event`, a kind, and its fields.
Numbers that are not finite are null, so that a column of numbers stays one, and `nonfinite` says what they were.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_torch.storage.atomic import atomic_file
from dalle_torch.storage.lines import LinesFile, repair, set_aside
from dalle_torch.tracking.base import Histogram

if TYPE_CHECKING:
    from PIL.Image import Image

SUPERSEDED = "superseded"


class JsonLinesTracker:
    """Appends to `path`, each line as soon as it is there.

    A reader wants one curve. Lines of steps that a killed process had done beyond the checkpoint that the run goes on
    from are moved to `NAME.superseded.jsonl` beside it, since those steps are done again.

    Args:
        path: the file; its folder is made.
        step: updates that are done where the run starts or goes on. Lines of later steps are moved.
        pictures: folder that gets pictures as PNG files, `NAME/step-000001000-00.png`; None: only captions are kept.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int = 0, pictures: Path | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.pictures = pictures
        self.superseded = _supersede(path, step)
        self._file = LinesFile(path)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._write(step, {name: _number(value) for name, value in metrics.items()})

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        rows = {
            name: {"counts": list(value.counts), "edges": list(value.edges), "norm": value.norm}
            for name, value in values.items()
        }
        self._write(step, {"histograms": rows})

    def images(self, name: str, images: Sequence["Image"], captions: Sequence[str], step: int) -> None:
        files = []
        if self.pictures is not None:
            for i, image in enumerate(images):
                file = f"{_file_name(name)}/step-{step:09d}-{i:02d}.png"
                with atomic_file(self.pictures / file) as place:
                    image.save(place)
                files.append(file)
        self._write(step, {"images": name, "captions": list(captions), "files": files})

    def event(self, kind: str, fields: Mapping[str, Any], step: int) -> None:
        self._write(step, {"event": kind} | dict(fields))

    def finish(self, status: str) -> None:
        self._file.close()

    def _write(self, step: int, fields: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rest = {name: value for name, value in fields.items() if name not in _OWN}
        self._file.append({"step": step, "time": now} | rest)


_OWN = ("step", "time")


def _number(value: float) -> float:
    """Also of numpy's and torch's scalars, which JSON does not know."""
    return value if isinstance(value, int) else float(value)


def _file_name(name: str) -> str:
    kept = "".join(char if char.isalnum() or char in "-_." else "_" for char in name).strip(".")
    return kept or "images"


def _supersede(path: Path, step: int) -> int:
    """Move the lines of steps after `step` out of `path`; returns how many."""
    repair(path)
    if not path.is_file():
        return 0
    later: list[bytes] = []
    kept: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            (later if _step_of(line) > step else kept).append(line)
    if later:
        set_aside(path, path.with_name(f"{path.stem}.{SUPERSEDED}{path.suffix}"), later, kept)
    return len(later)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
