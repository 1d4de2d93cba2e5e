"""What is asked of a source: which of its files, in which version, from where."""

import glob
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

Choose = Callable[[Sequence[str]], Sequence[str] | None]
"""From the names of all files to the glob patterns of those wanted; `None` wants them all."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `resolve`, checked."""

    inside: PurePosixPath
    """The folder inside the source that counts; `choose` sees names below it."""
    choose: Choose
    revision: str | None
    token: str | bool | None
    cache_dir: Path | None
    local_files_only: bool

    def patterns(self, names: Iterable[str]) -> list[str] | None:
        """Glob patterns, from the source's root, of the files wanted out of `names`; `None` wants them all."""
        if not self.inside.parts:
            chosen = self.choose(list(names))
            return None if chosen is None else list(chosen)
        prefix = f"{self.inside}/"
        chosen = self.choose([name.removeprefix(prefix) for name in names if name.startswith(prefix)])
        return [glob.escape(prefix) + pattern for pattern in (["*"] if chosen is None else chosen)]


def matching(names: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """Those of `names` that any of `patterns` covers; `None` covers all."""
    return [name for name in names if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)]


def files_below(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it, with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
