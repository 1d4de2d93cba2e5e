"""What the processes of a run have to have in common, compared before they train: else they train different models, or
wait for each other for ever.

Owns: options, versions, the folder of checkpoints and what is found in it, weights; one line, the same in every
process, for what differs. Does not own: the exchange (`parallel.engine`), what a host has to have at all
(`launch/preflight.py`).
"""

import hashlib
import importlib.metadata
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import dalle_torch
from dalle_torch.config import RunConfig
from dalle_torch.parallel.engine import Engine
from dalle_torch.training.run_folder import differences

_OWN = ("runtime.device",)
"""Options that each process may have otherwise."""
_PACKAGES = ("torch", "torch_xla", "accelerate", "transformers")
_SHOWN = 4
"""Differences named in an error."""
_PATIENCE = 10.0
"""Seconds within which a network file system shows a file of another host."""


def compare_options(engine: Engine, config: RunConfig) -> None:
    """Refuse processes with other options or versions than process 0.

    Raises:
        ValueError: in every process; options and versions are named.
    """
    if engine.host_count == 1:
        return
    said = engine.gather({"versions": _versions(), "options": asdict(config)})
    problems = _of_several(
        [
            f"{change.name} is {change.new!r} in process {index} and {change.old!r} in process 0"
            for change in differences(said[0][part], found[part])
            if change.name not in _OWN
        ]
        for part in ("versions", "options")
        for index, found in enumerate(said)
    )
    if problems:
        raise ValueError(
            f"the processes of this run do not agree: {problems}; give all of them the same file, the same --set and "
            f"the same installation"
        )


def compare_checkpoints(engine: Engine, url: str, step: int) -> None:
    """Refuse processes that do not share the folder of checkpoints, or go on from other steps.

    Args:
        url: the folder.
        step: of the newest checkpoint found there, 0 if there is none.

    Raises:
        ValueError: in every process.
    """
    if engine.host_count == 1:
        return
    apart = _without_the_folder(engine, url) if "://" not in url else []
    if apart:
        raise ValueError(
            f"{url} of process 0 is not there for {_processes(apart)}: set checkpoint.folder to a folder or URL that "
            f"all hosts share, such as gs://bucket/run"
        )
    steps = engine.gather(step)
    other = [index for index, found in enumerate(steps) if found != steps[0]]
    if other:
        raise ValueError(
            f"{_processes(other)} found the checkpoint of step {steps[other[0]]} in {url}, and process 0 that of step "
            f"{steps[0]}: see that all hosts can read all of it, and that no other run writes there"
        )


def compare_weights(engine: Engine, model: nn.Module) -> None:
    """Refuse processes that begin with different weights: they would train different models without a word.

    Raises:
        ValueError: in every process.
    """
    if engine.host_count == 1:
        return
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().view(torch.uint8).numpy())
    hashes = engine.gather(digest.hexdigest())
    different = [index for index, found in enumerate(hashes) if found != hashes[0]]
    if different:
        raise ValueError(
            f"the weights of {_processes(different)} differ from those of process 0: give all the "
            f"same configuration, checkpoint and versions of torch"
        )


def _versions() -> dict[str, str]:
    found = {"dalle_torch": dalle_torch.__version__}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _without_the_folder(engine: Engine, url: str) -> list[int]:
    """Processes that do not see a file which process 0 puts into the folder for a moment."""
    probe = None
    try:
        reason = None
        if engine.host_index == 0:
            try:
                os.makedirs(url, exist_ok=True)
                probe = Path(url, f".shared-{secrets.token_hex(8)}")
                probe.touch()
            except OSError as error:
                reason = f"{url} cannot be written ({error.strerror or error}): see who owns it"
        name, reason = engine.gather((probe and probe.name, reason))[0]
        if reason is not None:
            raise OSError(reason)
        seen = engine.gather(_appears(Path(url, name)))
        return [index for index, found in enumerate(seen) if not found]
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end or not path.parent.exists():
            return False
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(path.parent)  # has network file systems look again
    return True


def _of_several(problems: Iterable[Sequence[str]]) -> str:
    """All of them in one line, which a pod of many hosts does not make a page."""
    found = [problem for group in problems for problem in group]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _processes(indices: Sequence[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
