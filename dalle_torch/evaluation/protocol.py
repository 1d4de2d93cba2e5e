"""What a result says of itself, so that two people who have the same one know it.

Owns: the protocol's version, the facts of the environment, the file format of results. Does not own: the figures.
"""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dalle_torch.storage import atomic_file

PROTOCOL = "dalle-torch-1"
"""Figures of one protocol can be compared. It changes with anything that changes a figure: sizes, resampling, sums."""

_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "torchmetrics",
    "torch-fidelity",
    "open_clip_torch",
    "numpy",
    "pillow",
)


def environment() -> dict[str, Any]:
    """What may move the last digits of a figure: versions, processor, threads, a GPU if there is one.

    On a CPU figures are the same each time; a GPU's sums are not always.
    """
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
    }


def write_result(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """JSON with sorted keys and every digit; whole or not at all.

    Raises:
        ValueError: a figure is not finite, which JSON cannot say.
        OSError: it cannot be written there.
    """
    text = json.dumps({"protocol": PROTOCOL} | result, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", errors="replace")


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A result that `write_result` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no result, or one of another protocol.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        protocol = result["protocol"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no result of dalle-torch: {error!r}") from error
    if protocol != PROTOCOL:
        raise ValueError(f"{path} is of protocol {protocol!r}, whose figures cannot be compared with {PROTOCOL!r}")
    return result
