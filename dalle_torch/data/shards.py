"""Where shards lie: names, patterns and URLs to a list of files, and files to byte streams.

A name is a pattern only where nothing is there that is called just so, braces and brackets included.

Owns: brace expansion, globbing, folders, sizes, opening through fsspec, and one clear line for whatever a file system
says no with. Does not own: what the files hold (`tar`, `rows`, `sources`).
"""

import errno
import glob
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

SUFFIXES = (".tar", ".parquet")
BLOCK_SIZE = 1 << 20
"""Bytes that are asked of a remote file system at a time."""
MAX_SHARDS = 1_000_000
_GLOB = "*?["
_PATTERN = _GLOB + "{"
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.\d+)?\}", re.ASCII)
_SHOWN = 5


@dataclass(frozen=True)
class Shard:
    """One file of samples."""

    url: str
    """A path, or a URL that fsspec opens."""
    size: int
    """Bytes."""

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return PurePosixPath(self.url.replace(os.sep, "/")).name

    @property
    def stem(self) -> str:
        """`name` without `.tar` or `.parquet`."""
        name = self.name
        return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)

    @property
    def folder(self) -> str:
        """The URL of the folder that holds it."""
        return self.url[: -len(self.name)].rstrip("/") or ("/" if self.url.startswith("/") else ".")

    @property
    def is_parquet(self) -> bool:
        return self.name.endswith(".parquet")


def find_shards(patterns: str | Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[Shard]:
    """The files that patterns stand for, each once, sorted by URL.

    Args:
        patterns: paths or URLs, with braces ("train-{00000..00099}.tar") and globs; a folder stands for the files
            with one of `suffixes` that lie in it. A file or folder of just that name comes before what it would stand
            for.

    Raises:
        FileNotFoundError: a pattern matches nothing, or some of the names that braces list are not there.
        PermissionError, ConnectionError: a file system cannot be read.
        ValueError: there is no pattern, it is malformed, or nothing here can open its kind of URL.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns or not all(patterns):
        raise ValueError("no shards are named: give paths, URLs or patterns such as 'train-{00000..00099}.tar'")
    found: dict[str, Shard] = {}
    for pattern in patterns:
        for shard in _find(pattern, suffixes):
            found[shard.url] = shard
    return [found[url] for url in sorted(found)]


def _find(pattern: str, suffixes: Sequence[str]) -> Iterator[Shard]:
    names = [pattern] if "{" in pattern and is_there(pattern) else _expand_braces(pattern)
    missing, count = [], 0
    for name in names:
        matches = list(_matches(name, suffixes))
        count += len(matches)
        if not matches:
            missing.append(name)
        yield from matches
    if missing and (count == 0 or not any(char in pattern for char in _GLOB)):
        if missing == [pattern]:
            raise FileNotFoundError(f"no shard matches {pattern}")
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise FileNotFoundError(f"{pattern} stands for {len(names)} shards, of which {len(missing)} are not: {shown}")


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    from braceexpand import braceexpand

    # The library lays a whole range out in memory before it gives the first name.
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if count <= MAX_SHARDS:
        try:
            return list(braceexpand(pattern))
        except ValueError as error:
            raise ValueError(f"{pattern}: its braces do not match ({error})") from error
    raise ValueError(f"{pattern} stands for more than {MAX_SHARDS:,} shards")


def _matches(name: str, suffixes: Sequence[str]) -> Iterator[Shard]:
    fs, path = file_system(name)
    remote = is_remote(name)
    with readable(name):
        if any(char in path for char in _GLOB) and not is_there(name):
            entries = fs.glob(_literal_folders(fs, path), detail=True)
            found = [entry for entry in entries.values() if entry["type"] == "file"]
            listed = [entry for entry in found if str(entry["name"]).endswith(tuple(suffixes))] or found
        elif fs.isdir(path):
            entries = fs.ls(path, detail=True)
            listed = [e for e in entries if e["type"] == "file" and str(e["name"]).endswith(tuple(suffixes))]
        elif fs.exists(path):
            listed = [fs.info(path)]
        else:
            listed = []
        for entry in listed:
            if not PurePosixPath(entry["name"]).name.startswith("."):
                url = fs.unstrip_protocol(entry["name"]) if remote else _like(name, entry["name"])
                yield Shard(url, int(entry["size"] or 0))


def is_there(name: str) -> bool:
    """Whether a file or folder has just this name; a pattern that a file system takes for no name at all is not."""
    fs, path = file_system(name)
    try:
        return bool(fs.exists(path))
    except Exception:
        if any(char in path for char in _PATTERN):
            return False
        raise


def _literal_folders(fs: Any, path: str) -> str:
    """`path` with brackets and the like escaped in those of its first folders that are there as they are written."""
    *folders, name = path.split("/")
    done: list[str] = []
    for index, folder in enumerate(folders):
        if any(char in folder for char in _GLOB):
            if not fs.exists("/".join(folders[: index + 1])):
                break
            folder = glob.escape(folder)
        done.append(folder)
    return "/".join([*done, *folders[len(done) :], name])


def _like(given: str, absolute: str) -> str:
    """A local file's path, relative where `given` was, so that a run does not depend on where it was started from."""
    return absolute if os.path.isabs(os.path.expanduser(given)) else os.path.relpath(absolute)


def is_remote(url: str) -> bool:
    """Whether `url` names a file system rather than a path on this machine."""
    return "://" in url and not url.startswith(("file://", "local://"))


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a path or URL.

    Raises:
        ValueError: no file system here opens such a URL.
    """
    import fsspec

    if url.startswith("pipe:"):
        raise ValueError(f"{url}: commands are not run; name a file or a URL")
    if not is_remote(url):
        path = os.path.abspath(os.path.expanduser(url.removeprefix("file://").removeprefix("local://")))
        return fsspec.filesystem("file"), path
    with readable(url):
        fs, path = fsspec.core.url_to_fs(url)
    return fs, str(path)


def same_place(first: str, second: str) -> bool:
    """Whether two paths or URLs lead to the same file; neither need be there."""
    (system, path), (other, other_path) = file_system(first), file_system(second)
    if is_remote(first) or is_remote(second):
        return type(system) is type(other) and path == other_path
    return os.path.realpath(path) == os.path.realpath(other_path)


@contextmanager
def open_shard(url: str) -> Iterator[BinaryIO]:
    """The file's bytes.

    Raises:
        OSError: it cannot be opened.
    """
    fs, path = file_system(url)
    with readable(url):
        opened = fs.open(path, "rb", block_size=BLOCK_SIZE) if is_remote(url) else io.FileIO(path)
    with opened as file:
        yield file


@contextmanager
def readable(url: str, keep: tuple[type[Exception], ...] = (), action: str = "read") -> Iterator[None]:
    """Whatever goes wrong inside with a file system becomes one line that names `url` and could not be `action`.

    File systems fail with exceptions of their own (a missing login, a bucket that is not there, a broken connection);
    what they share is that `url` was not to be had. Exceptions of the types in `keep` pass through as they are.
    """
    try:
        yield
    except keep:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} is not there") from error
    except PermissionError as error:
        raise PermissionError(f"{url} may not be {action}: {_line(error)}") from error
    except ImportError as error:
        raise ValueError(f"{url} needs a package that is not installed: {_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{url} cannot be opened: {_line(error)}") from error
    except (KeyboardInterrupt, MemoryError, GeneratorExit):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EISDIR, errno.ENOTDIR):
            raise OSError(f"{url} is not a file") from error
        raise ConnectionError(f"{url} cannot be {action}: {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def local_path(url: str) -> Path:
    """`url` as a path on this machine."""
    return Path(url.removeprefix("file://").removeprefix("local://")).expanduser()
