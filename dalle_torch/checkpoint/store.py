"""A folder on a local disk or behind an fsspec URL, with the few things that checkpoints need of it.

Owns: paths, listings, small files that are whole or absent, removal. Does not own: what the files mean.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from dalle_torch.storage import atomic_file


class Store:
    """The folder at `url`.

    Attributes:
        url: as errors name it.
        local: whether it is on a disk of this machine, where folders can be renamed.

    Raises:
        ValueError: fsspec does not know the scheme, or the package that reads it is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.local = "://" not in url or url.startswith("file://")
        if self.local:
            url = str(Path(url.removeprefix("file://")).expanduser().absolute())
        self.url = url.rstrip("/") or "/"
        try:
            self.system, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"checkpoint folder {url}: {error}") from error
        self.root = root.rstrip("/")

    def path(self, *parts: str) -> str:
        """Of a file or folder inside, as the file system takes it."""
        return "/".join((self.root, *parts))

    def exists(self, *parts: str) -> bool:
        self.system.invalidate_cache()
        return bool(self.system.exists(self.path(*parts)))

    def folders(self) -> list[str]:
        """Names of the folders right below; none if this one is not there."""
        self.system.invalidate_cache()
        try:
            entries = self.system.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(_name(entry["name"]) for entry in entries if entry["type"] == "directory")

    def files(self, folder: str) -> dict[str, int]:
        """Name and size in bytes of the files right in `folder`; folders in it count as files of -1 bytes.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        self.system.invalidate_cache()
        return {
            _name(entry["name"]): int(entry["size"]) if entry["type"] == "file" else -1
            for entry in self.system.ls(self.path(folder), detail=True)
        }

    def read(self, folder: str, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file's content, or the bytes of it from `start` up to `end`."""
        return bytes(self.system.cat_file(self.path(folder, name), start=start, end=end))

    def write(self, folder: str, name: str, content: bytes) -> None:
        """A small file, that appears whole."""
        if not self.local:
            self.system.pipe_file(self.path(folder, name), content)
            return
        if not os.path.isdir(self.path(folder)):  # it is not made again: someone has taken it away
            raise FileNotFoundError(f"{self.path(folder)} has gone")
        with atomic_file(self.path(folder, name)) as path:
            path.write_bytes(content)

    def make(self, folder: str) -> None:
        """An empty folder; object stores have none, and are not asked."""
        if self.local:
            os.makedirs(self.path(folder))

    def rename(self, old: str, new: str) -> None:
        """On a local disk alone: the folder `old` is `new` from one moment to the next, and on the disk for good."""
        for name in os.listdir(self.path(old)):
            _flush(self.path(old, name))
        _flush(self.path(old))
        os.rename(self.path(old), self.path(new))
        _flush(self.root)

    def remove(self, folder: str, first: str) -> None:
        """A folder with all that is in it, the file `first` before anything else."""
        with suppress(FileNotFoundError):
            self.system.rm_file(self.path(folder, first))
        with suppress(FileNotFoundError):
            self.system.rm(self.path(folder), recursive=True)
        self.system.invalidate_cache()

    def writer(self, folder: str) -> Any:
        """A writer of torch.distributed.checkpoint for the parts of tensors in `folder`."""
        if self.local:
            from torch.distributed.checkpoint import FileSystemWriter

            return FileSystemWriter(self.path(folder), single_file_per_rank=True, sync_files=True)
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        # Object stores hold what they have acknowledged; there is no local disk to flush.
        return FsspecWriter(f"{self.url}/{folder}", single_file_per_rank=True, sync_files=False)


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot flush folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
