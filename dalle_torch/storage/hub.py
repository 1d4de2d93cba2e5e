"""Repositories of the Hugging Face hub, through huggingface_hub, with an error message for every way it can fail."""

import re
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm as hub_tqdm

from dalle_torch.log import get_logger
from dalle_torch.storage.choice import Request, files_below, matching

logger = get_logger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOGIN = "pass token=..., set HF_TOKEN, or run `hf auth login`"
_OFFLINE = "local_files_only forbids to download it: connect once without it"


class _Bar(hub_tqdm):
    """The hub's progress bar, silent where stderr is no terminal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not sys.stderr.isatty():
            kwargs["disable"] = True
        super().__init__(*args, **kwargs)


def from_hub(hub_id: str, request: Request) -> Path:
    """The snapshot folder of `hub_id`, holding at least what `request` wants.

    A pinned commit that is whole in the cache is taken without asking the hub, and so is anything when the hub cannot
    be reached.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `resolve`.
    """
    revision = request.revision
    if revision is not None and (not revision or revision.startswith("/") or ".." in revision):
        raise ValueError(f"revision={revision!r} is no name of a branch, tag or commit")
    if request.local_files_only or _COMMIT.fullmatch(revision or ""):
        folder = _cached(hub_id, request)
        if folder is not None:
            return folder
        if request.local_files_only:
            raise FileNotFoundError(f"{_full(hub_id, request)} is not in the cache, or not whole, and {_OFFLINE}")
    try:
        info = HfApi(token=request.token).model_info(hub_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = [file.rfilename for file in info.siblings or ()]
        patterns = request.patterns(names)
        if not matching(names, patterns):
            # Told here, since snapshot_download would warn and give an empty folder.
            asked = ", ".join(patterns or ["any"])
            raise FileNotFoundError(f"{_full(hub_id, request)} has none of the files asked for: {asked}")
        return Path(snapshot_download(hub_id, allow_patterns=patterns, tqdm_class=_Bar, **_options(request)))
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        if not isinstance(cause, RevisionNotFoundError):
            folder = _cached(hub_id, request)
            if folder is not None:
                logger.warning("%s: the copy in the cache is used, for %s", hub_id, _reason(cause))
                return folder
        raise _explained(hub_id, request, cause) from error


def _options(request: Request) -> dict[str, Any]:
    return {"revision": request.revision, "token": request.token, "cache_dir": request.cache_dir}


def _cached(hub_id: str, request: Request) -> Path | None:
    """The folder of the cached snapshot if everything that is wanted of it is there."""
    options = _options(request) | {"local_files_only": True}
    try:
        # Asking for no file at all finds the folder, whatever it holds.
        folder = Path(snapshot_download(hub_id, allow_patterns=[], **options))
        present = files_below(folder)
        patterns = request.patterns(present)
        if not matching(present, patterns):
            return None
        return Path(snapshot_download(hub_id, allow_patterns=patterns, **options))
    except FileNotFoundError:
        return None


def _full(hub_id: str, request: Request) -> str:
    return f"{hub_id} (revision {request.revision or 'main'})"


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _reason(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"the hub at {constants.ENDPOINT} answered {status}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"the hub at {constants.ENDPOINT} could not be reached ({type(error).__name__})"


def _explained(hub_id: str, request: Request, error: BaseException) -> OSError:
    """The same failure in one line that says what to do."""
    status, reason, name = _status(error), _reason(error), _full(hub_id, request)
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{hub_id} has no revision {request.revision!r}: name a branch, tag or commit of it")
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{hub_id}"
        return PermissionError(f"{hub_id} is gated ({reason}): accept its terms at {page}, then {_LOGIN}")
    if status == 403:
        return PermissionError(f"{reason} for {hub_id}: the token may not read it; use one with read access: {_LOGIN}")
    if status == 401:
        return PermissionError(f"{reason} for {hub_id}: it does not exist or is private; check the name, or {_LOGIN}")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return FileNotFoundError(f"{reason} for {hub_id}: no such repository, and no such folder here; check the name")
    if status == 429:
        wait = error.response.headers.get("Retry-After") if isinstance(error, HfHubHTTPError) else None
        pause = f"wait {wait} s" if wait else "wait some minutes"
        return ConnectionError(f"{reason}, too many requests, for {hub_id}: {pause}, or {_LOGIN} for a higher limit")
    if status is not None:
        return ConnectionError(f"{reason} for {hub_id}: try again later")
    return ConnectionError(f"{reason} and {name} is not whole in the cache: connect once, or give a local folder")
