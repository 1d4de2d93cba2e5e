"""Small files in a folder that is here or behind a URL (fsspec).

Owns: reading, writing, listing and moving them, and what errors become. Does not own: downloads of models (`remote`).
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dalle_torch.storage.atomic import atomic_file


class Place:
    """A folder, named by a path or a URL such as gs://bucket/run.

    Names of files are relative to it, with "/". Every method raises OSError for what the other side refuses.

    Attributes:
        name: as it was given, without a "/" at its end.
        path: where it is on this machine, None behind a URL.

    Raises:
        ValueError: nothing here reads URLs of that kind.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        self.name = os.fspath(name).rstrip("/") or "/"
        self.path: Path | None = None
        self._system: Any = None
        if "://" not in self.name:
            self.path = Path(self.name).expanduser()
            return
        if self.name.startswith("file://"):
            self.path = Path(unquote(urlsplit(self.name).path))
            return
        import fsspec

        try:
            self._system, root = fsspec.core.url_to_fs(self.name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{self.name} cannot be reached: {' '.join(str(error).split())}") from error
        self._root = root.rstrip("/")

    @property
    def is_remote(self) -> bool:
        return self.path is None

    def __str__(self) -> str:
        return self.name

    def __truediv__(self, below: str) -> "Place":
        return Place(f"{self.name.rstrip('/')}/{below}")

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A file's content, or its first `limit` bytes. Raises FileNotFoundError, OSError."""
        if self.path is not None:
            with (self.path / name).open("rb") as file:
                return file.read(-1 if limit is None else limit)
        return self._ask("cat_file", f"{self._root}/{name}", end=limit)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, or none; one of that name is replaced, and folders are made."""
        if self.path is not None:
            with atomic_file(self.path / name) as place:
                place.write_bytes(data)
            return
        # An object store shows an object when all of it has come; the others make no promise.
        self._ask("makedirs", os.path.dirname(f"{self._root}/{name}"), exist_ok=True)
        self._ask("pipe_file", f"{self._root}/{name}", data)

    def names(self) -> list[str]:
        """The files in the folder itself, sorted, without hidden ones; none where there is no folder."""
        if self.path is not None:
            try:
                with os.scandir(self.path) as entries:
                    found = [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
            except FileNotFoundError:
                return []
        else:
            try:
                self._ask("invalidate_cache", self._root)
                listed = self._ask("ls", self._root, detail=True)
            except FileNotFoundError:
                return []
            found = [os.path.basename(entry["name"]) for entry in listed if entry["type"] == "file"]
        return sorted(name for name in found if name and not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is fine."""
        try:
            if self.path is not None:
                (self.path / name).unlink()
            else:
                self._ask("rm_file", f"{self._root}/{name}")
        except FileNotFoundError:
            return

    def move(self, name: str, target: str) -> None:
        """Rename a file; one of the name `target` is replaced, and folders are made."""
        if self.path is not None:
            (self.path / target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path / name, self.path / target)
            return
        self.write(target, self.read(name))
        self.remove(name)

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        try:
            return getattr(self._system, method)(*args, **options)
        except OSError:
            raise
        except Exception as error:
            # Each file system fails with exceptions of its own; what they share is that the other side did not do it.
            raise OSError(f"{self.name}: {type(error).__name__}: {' '.join(str(error).split())}") from error
