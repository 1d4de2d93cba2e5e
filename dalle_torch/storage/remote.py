"""Folders behind a URL (fsspec) and wandb artifacts, mirrored file by file into a cache folder.

The only place besides `tracking` that imports wandb.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dalle_torch.log import get_logger, progress
from dalle_torch.storage.atomic import atomic_file
from dalle_torch.storage.choice import Request, files_below, matching

logger = get_logger(__name__)

_RECORD = ".dalle_torch.json"
Fetch = Callable[[str, Path], None]
"""Brings the file of the given name to the given path."""


def from_url(url: str, request: Request) -> Path:
    """The cached copy of the folder at `url`; only files that are new or have changed are downloaded.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `resolve`.
    """
    folder = _cache(request) / "urls" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:32]
    if request.local_files_only:
        return _kept(folder, url, request)
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{url} has a scheme that fsspec does not know: {_line(error)}") from error
    root = root.rstrip("/")
    try:
        found = [name for name in system.find(root) if name != root]
        listing = {str(PurePosixPath(name).relative_to(root)): system.ukey(name) for name in found}
        return _mirror(folder, url, listing, request, lambda name, path: system.get_file(f"{root}/{name}", str(path)))
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        # Each file system fails with exceptions of its own; what they share is that the folder was not to be had.
        return _kept(folder, url, request, because=error)


def from_wandb(name: str, request: Request) -> Path:
    """The cached copy of the wandb artifact `name`; only the files that are wanted are downloaded.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `resolve`.
    """
    folder = _cache(request) / "wandb" / name.replace(":", "/")
    if request.local_files_only:
        return _kept(folder, name, request)
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"{name} is a wandb artifact and wandb is not installed: pip install 'dalle-torch[train]'"
        ) from error
    try:
        artifact = wandb.Api().artifact(name)
        listing = {str(path): str(entry.digest) for path, entry in artifact.manifest.entries.items()}
        return _mirror(folder, name, listing, request, lambda file, path: _fetch_entry(artifact, file, path))
    except (FileNotFoundError, PermissionError):
        raise
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        hint = "run `wandb login` or set WANDB_API_KEY"
        raise PermissionError(f"{name}: wandb wants a login: {hint} ({_line(error)})") from error
    except (wandb.Error, ValueError, OSError) as error:
        if any(phrase in str(error).lower() for phrase in ("not found", "does not exist", "could not find")):
            raise FileNotFoundError(f"{name}: no such artifact, or not for this account ({_line(error)})") from error
        return _kept(folder, name, request, because=error)


def _fetch_entry(artifact: Any, name: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as workplace:
        shutil.move(artifact.get_entry(name).download(root=workplace, skip_cache=True), path)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _cache(request: Request) -> Path:
    if request.cache_dir is not None:
        return request.cache_dir
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "dalle_torch"


def _mirror(folder: Path, name: str, listing: Mapping[str, str], request: Request, fetch: Fetch) -> Path:
    """Bring the wanted files of `listing` (name -> fingerprint) to `folder`, and drop what is outdated there."""
    bad = [file for file in listing if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts]
    if bad:
        raise PermissionError(f"{name} has files that lead out of its folder, none was taken: {', '.join(bad)}")
    wanted = matching(listing, request.patterns(listing))
    if not wanted:
        raise FileNotFoundError(f"{name} has none of the files asked for; it has: {', '.join(listing) or 'no files'}")
    record = {file: key for file, key in _recorded(folder).items() if listing.get(file) == key}
    # Outdated files go first, so that an interruption never leaves files of two versions side by side.
    for stale in set(files_below(folder)) - set(record) - {_RECORD}:
        (folder / stale).unlink()
    _write_record(folder, listing, record)
    missing = [file for file in wanted if file not in record or not (folder / file).is_file()]
    for file in progress(missing, desc=name, unit="file"):
        with atomic_file(folder / file) as path:
            fetch(file, path)
        record[file] = listing[file]
        _write_record(folder, listing, record)
    return folder


def _write_record(folder: Path, listing: Mapping[str, str], record: Mapping[str, str]) -> None:
    with atomic_file(folder / _RECORD) as path:
        path.write_text(json.dumps({"listing": sorted(listing), "files": record}))


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / _RECORD).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _kept(folder: Path, name: str, request: Request, because: Exception | None = None) -> Path:
    """The cached copy, if it holds all that is wanted out of what the source had when it was last seen."""
    try:
        listing = json.loads((folder / _RECORD).read_text())["listing"]
        wanted = matching(listing, request.patterns(listing))
        whole = bool(wanted) and all((folder / file).is_file() for file in wanted)
    except (OSError, ValueError, KeyError):
        whole = False
    if whole:
        if because is not None:
            logger.warning("%s: the copy in the cache is used, for the download failed (%s)", name, _line(because))
        return folder
    if because is None:
        raise FileNotFoundError(f"{name} is not whole in the cache, and local_files_only forbids to download it")
    raise ConnectionError(f"{name}: the download failed and no whole copy is cached ({_line(because)})") from because
