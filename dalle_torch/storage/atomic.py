"""Files and folders that are whole or absent: written beside their place, flushed to disk, then renamed."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to; on success that file takes the place of `path`, else it is removed.

    The temporary name ends like `path`, for writers that go by the suffix. Folders above `path` are made.

    Raises:
        IsADirectoryError: `path` is a folder.
        FileNotFoundError: the block succeeded without writing the file.
    """
    path = _absolute(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file that can be written")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder to fill; on success it takes the place of `path`, all of whose old content goes.

    An interruption at any moment leaves either the old folder or the new one in place.

    Raises:
        NotADirectoryError: `path` is a file.
        ValueError: `path` is the current folder, the home folder or one above them, too much to replace.
    """
    path = _absolute(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a folder that can be written")
    kept = (Path.cwd(), Path.home())
    if any(path == place or path in place.parents for place in kept):
        raise ValueError(f"{path} holds the current or the home folder and is not replaced: name a folder of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if not file.is_symlink():
                _flush(file)
        _flush(temporary)
        if path.is_dir():
            path.rename(old)
        temporary.rename(path)
        _flush(path.parent)
    finally:
        if old.is_dir() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _absolute(path: str | os.PathLike[str]) -> Path:
    # A link is followed, so that the place it points to is written and the link stays.
    return Path(path).expanduser().resolve()


def _beside(path: Path, kind: str) -> Path:
    """A free name in the same folder, so that the rename stays on one file system."""
    return path.with_name(f".{kind}-{secrets.token_hex(4)}-{path.name}")


def _flush(path: Path) -> None:
    """Ask the disk to hold `path` (a file or a folder's entries) before what follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot flush folders; the content of files they can.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
