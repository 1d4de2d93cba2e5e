"""From the name of a source to a local folder, and the choice of one weight format where a source holds several."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from dalle_torch.storage.choice import Request, matching

WEIGHT_FORMATS: tuple[tuple[str, ...], ...] = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("flax_model.msgpack",),
    ("model.yaml", "*.ckpt"),
    ("encoder*.pt", "decoder*.pt", "detoker*.pt"),
)
"""Glob patterns of the weight files of each format, the preferred format first."""

COMPANIONS: tuple[str, ...] = ("*.json", "*.txt", "*.md", "*.model", "LICENSE*")
"""Glob patterns of the small files that go with the weights of a model."""

_ARTIFACT = re.compile(r"(\w[\w.\-]*/){2}\w[\w.\-]*:\w[\w.\-]*")
_HUB_ADDRESS = re.compile(r"^(hf://|https?://(www\.)?(huggingface\.co|hf\.co)/)")


class CheckpointError(ValueError):
    """Weights that do not fit the model, or a file that is not what its name says; one message lists every problem."""


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """The local folder that `source` leads to, downloaded if need be.

    Args:
        source: a folder, a hub id `name/repo`, a wandb artifact `entity/project/name:version`, or a URL of any file
            system that fsspec knows (`gs://bucket/folder`, `s3://...`). A folder of that name goes before the hub.
        revision: branch, tag or commit of a hub repository.
        token: hub token; by default the one of `hf auth login` or of the variable `HF_TOKEN`.
        cache_dir: where downloads go, by default the hub's own cache for hub ids and `~/.cache/dalle_torch` for others.
        subfolder: folder inside the source; the returned path includes it.
        local_files_only: use what is in the cache and ask nobody.
        allow_patterns: glob patterns, below `subfolder`, of the files to download; `None` takes them all.

    Raises:
        FileNotFoundError: no such folder, repository, revision, artifact or file.
        PermissionError: a token is missing or not accepted.
        ConnectionError: the other side cannot be reached or refuses for now, and nothing is cached.
        ValueError: `source`, `revision` or `subfolder` is malformed, or the package that reads it is not installed.
    """
    request = Request(
        inside=_inside(subfolder),
        choose=lambda names: allow_patterns,
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
        local_files_only=local_files_only,
    )
    return _resolve(source, request)


def resolve_model(
    source: str | os.PathLike[str],
    *,
    weight_formats: Sequence[Sequence[str]] = WEIGHT_FORMATS,
    companions: Sequence[str] = COMPANIONS,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Like `resolve`, for sources that may hold the same weights in several formats: one of them is downloaded.

    Args:
        weight_formats: glob patterns of each format the caller can read; the first one present is taken.
        companions: glob patterns of what is downloaded beside the weights.

    Raises:
        FileNotFoundError: the source holds no weights in any of `weight_formats`; what it holds is named. A local
            folder is returned unseen.
    """

    def choose(names: Sequence[str]) -> Sequence[str]:
        return (*choose_weights(names, weight_formats, source), *companions)

    request = Request(
        inside=_inside(subfolder),
        choose=choose,
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
        local_files_only=local_files_only,
    )
    return _resolve(source, request)


def choose_weights(
    names: Iterable[str],
    weight_formats: Sequence[Sequence[str]] = WEIGHT_FORMATS,
    source: str | os.PathLike[str] = "the folder",
) -> Sequence[str]:
    """The patterns of the first weight format that `names` has files of.

    Raises:
        FileNotFoundError: there is none; the message names `source` and what it holds.
    """
    names = sorted(names)
    for patterns in weight_formats:
        if matching(names, patterns):
            return patterns
    formats = ", ".join(patterns[0] for patterns in weight_formats)
    held = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise FileNotFoundError(f"{source} has no weights that can be read here ({formats}); it has: {held or 'no files'}")


def _resolve(source: str | os.PathLike[str], request: Request) -> Path:
    name = os.fspath(source)
    local = Path(name).expanduser()
    if name and local.is_dir():
        if request.revision is not None:
            raise ValueError(f"revision={request.revision!r} is for the hub, and {name} is a folder: leave it out")
        folder = local
    elif not name or local.exists() or isinstance(source, os.PathLike):
        raise _no_source(name, local)
    else:
        folder = _download(name, request)
    if not (folder / request.inside).is_dir():
        what = f"no folder {str(request.inside)!r}" if request.inside.parts else "none of the files asked for"
        raise FileNotFoundError(f"{name} has {what}")
    return folder / request.inside


def _download(name: str, request: Request) -> Path:
    hub_id = _hub_id(name)
    if hub_id is not None:
        from dalle_torch.storage.hub import from_hub

        return from_hub(hub_id, request)
    if "://" in name:
        from dalle_torch.storage.remote import from_url

        return from_url(name, request)
    if _ARTIFACT.fullmatch(name):
        from dalle_torch.storage.remote import from_wandb

        return from_wandb(name, request)
    raise _no_source(name, Path(name))


def _no_source(name: str, local: Path) -> Exception:
    if not name:
        return ValueError("the source is empty: give a folder, a hub id 'name/repo' or 'entity/project/name:version'")
    if local.exists():
        return NotADirectoryError(f"{name} is a file: give the folder that holds it")
    if ":" in name:
        return ValueError(f"{name!r} is neither a folder nor a wandb artifact, which is 'entity/project/name:version'")
    return FileNotFoundError(f"{name} is not a folder here, and no hub id either (those are 'name/repo')")


def _hub_id(name: str) -> str | None:
    """The hub id that `name` is, also as the address of the repository's page; `None` if it can be none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = _HUB_ADDRESS.sub("", name).rstrip("/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _inside(subfolder: str | None) -> PurePosixPath:
    inside = PurePosixPath((subfolder or "").replace("\\", "/"))
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"subfolder={subfolder!r} leads out of the source: give a relative path without '..'")
    return inside
