"""What a process knows of those it was started with: what a launcher such as torchrun says, and that they have gone.

Owns: the check of the first, before anybody waits for processes that were never started; one line for the second. Does
not own: launching (`launch/`, torchrun), the connection (accelerate, torch.distributed).
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""All of them name one process among several; without any the process is alone."""


class PeersLostError(ConnectionError):
    """Another process of the run has ended or does not answer; it knows why."""

    exit_status = 69
    """Of the process (EX_UNAVAILABLE of sysexits.h): a launcher looks for the cause elsewhere."""


_LOST = re.compile(
    r"gloo/|Connection (closed|reset) by peer|Broken pipe|Timed out waiting|Timed out after|timed out in recv|"
    r"remote process exited|failed to connect|client socket has|Failed to recv|Watchdog caught collective"
)
"""As gloo, NCCL and torch's store put it; they share no type of error."""


@contextmanager
def peers_watched() -> Iterator[None]:
    """What torch.distributed says of others that have gone, in one line.

    Raises:
        PeersLostError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        reason = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and not _LOST.search(reason):
            raise
        raise PeersLostError(
            f"another process of this run has ended or cannot be reached: what it said last tells why; the same "
            f"command goes on from the newest checkpoint ({reason[:200]})"
        ) from error


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
