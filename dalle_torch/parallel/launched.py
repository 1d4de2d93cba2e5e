"""What a launcher such as torchrun tells a process about the others.

Owns: the check of it, before anybody waits for processes that were never started. Does not own: launching (`launch/`,
torchrun), the connection (accelerate, torch.distributed).
"""

import os
from collections.abc import Mapping

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""All of them name one process among several; without any the process is alone."""


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes were started together, 1 where nothing is said.

    Raises:
        ValueError: a variable is missing, is no number, or contradicts another.
    """
    size = _number(environment, "WORLD_SIZE", lowest=1)
    rank = _number(environment, "RANK", lowest=0)
    if size is None and rank is None:
        return 1
    if size is None:
        raise ValueError(f"RANK={rank} without WORLD_SIZE in the environment: {_REMEDY}")
    if size == 1:
        return 1
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE={size} without {', '.join(missing)} in the environment: {_REMEDY}")
    if rank is not None and rank >= size:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={size}: {_REMEDY}")
    _number(environment, "MASTER_PORT", lowest=1, highest=65535)
    return size


_REMEDY = f"start every process with torchrun, or set {', '.join(VARIABLES)} for each"


def _number(environment: Mapping[str, str], name: str, *, lowest: int, highest: int | None = None) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    bound = f"from {lowest} to {highest}" if highest is not None else f"of at least {lowest}"
    if not text.strip().isdecimal() or int(text) < lowest or (highest is not None and int(text) > highest):
        raise ValueError(f"{name}={text!r} in the environment must be a whole number {bound}: {_REMEDY}")
    return int(text)
