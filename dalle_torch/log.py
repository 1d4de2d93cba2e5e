"""What the package says while it works: a logger that speaks on one host only, and progress bars.

Owns: the level, format and stream of the package's messages. Does not own: metrics (`tracking`).
"""

import logging
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_ROOT = "dalle_torch"
_LEVEL_VARIABLE = "DALLE_TORCH_LOG"
_rank: int | None = None


class _Handler(logging.Handler):
    """Writes to stderr without tearing a progress bar; silent where the application has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _RankFilter(logging.Filter):
    """Lets information through on the first process only; warnings and errors come from everywhere, with the rank."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = process_rank()
        record.where = f" [rank {rank}]" if rank else ""
        return rank == 0 or record.levelno >= logging.WARNING


def process_rank() -> int:
    """Index of this process among those of the run: as told to `set_rank`, else the launcher's `RANK`, else 0."""
    if _rank is not None:
        return _rank
    value = os.environ.get("RANK", "")
    return int(value) if value.isdecimal() else 0


def set_rank(rank: int | None) -> None:
    """Tell the loggers which process this is where the launcher does not say it (TPU hosts); `None` forgets it."""
    global _rank
    _rank = rank


def get_logger(name: str = _ROOT) -> logging.Logger:
    """A logger below `dalle_torch`; pass `__name__`.

    The environment variable `DALLE_TORCH_LOG` (debug, info, warning, error) sets the level, info if it is not there.

    Raises:
        ValueError: `DALLE_TORCH_LOG` names no level.
    """
    root = logging.getLogger(_ROOT)
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        handler = _Handler()
        handler.setFormatter(logging.Formatter("%(levelname).1s dalle_torch%(where)s: %(message)s"))
        handler.addFilter(_RankFilter())
        root.addHandler(handler)
        root.setLevel(_level())
    return root if name == _ROOT else logging.getLogger(name if name.startswith(f"{_ROOT}.") else f"{_ROOT}.{name}")


def _level() -> int:
    name = os.environ.get(_LEVEL_VARIABLE, "info").upper()
    level = logging.getLevelNamesMapping().get(name)
    if level is None:
        raise ValueError(f"{_LEVEL_VARIABLE}={name.lower()!r} is not one of debug, info, warning, error")
    return level


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    force: bool = False,
) -> "tqdm[Any]":
    """A progress bar with the time left, on stderr; an iterator over `iterable`, or moved by hand with `update`.

    It shows on the first process only, and only where stderr is a terminal unless `force` is set.
    """
    from tqdm import tqdm

    shown = process_rank() == 0 and (force or sys.stderr.isatty())
    return tqdm(
        iterable, total=total, desc=desc, unit=unit, disable=not shown, file=sys.stderr, dynamic_ncols=True, leave=False
    )
