"""Runs of a comparison as processes beside each other, of which none outlives this one.

Owns: starting, waiting, ending them all in order. Does not own: what a process does (`compare_run`), which runs there
are (`compare`).
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from dalle_torch.log import get_logger
from dalle_torch.training.run_folder import RunFolder

logger = get_logger(__name__)

LOG = "log.txt"
_POLL = 0.2
_PATIENCE = 120.0
"""Seconds that processes have to save and leave, or that one left behind by a killed comparison may take to."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Process:
    """One run at work in `folder`; its messages go to `log.txt` there."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder = folder
        environment = os.environ | {name: "1" for name in _THREADS} | {"USE_TORCH_XLA": "0"}
        with (folder / LOG).open("ab") as log:
            # In a session of its own Ctrl-C reaches this process alone, which then ends all of them once.
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(folder)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    @property
    def status(self) -> int | None:
        """Its exit status; None while it works."""
        return self._process.poll()

    def end(self) -> None:
        """Ask it to save and leave."""
        pipe: IO[bytes] | None = self._process.stdin
        if pipe is not None and not pipe.closed:
            pipe.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def run_all(
    folders: Sequence[Path], jobs: int, done: Callable[[Path], None], module: str = "dalle_torch.studies.compare_run"
) -> dict[Path, str]:
    """Run a process in each of `folders`, at most `jobs` at a time; one that fails does not stop the others.

    Args:
        done: is told of each folder whose process ended well.

    Returns:
        For each folder whose process failed, the last line it said.

    Raises:
        KeyboardInterrupt: Ctrl-C; the processes have saved and left.
    """
    waiting, working, failed = list(folders), list[Process](), dict[Path, str]()
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                folder = waiting.pop(0)
                _wait_for_others(folder)
                working.append(Process(folder, module))
            time.sleep(_POLL)
            for process in [process for process in working if process.status is not None]:
                working.remove(process)
                process.end()
                if process.status == 0:
                    done(process.folder)
                else:
                    failed[process.folder] = last_line(process.folder / LOG) or f"exit status {process.status}"
                    logger.warning("%s failed: %s", process.folder, failed[process.folder])
    finally:
        _end(working)
    return failed


def last_line(path: Path) -> str:
    """What a process said last, without the colours that some libraries add."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end(working: Sequence[Process]) -> None:
    if not working:
        return
    logger.warning("waiting for %d runs to save; Ctrl-C again ends them at once", len(working))
    try:
        for process in working:
            process.end()
        limit = time.monotonic() + _PATIENCE
        while any(process.status is None for process in working) and time.monotonic() < limit:
            time.sleep(_POLL)
    finally:
        for process in working:
            if process.status is None:
                process.kill()


def _wait_for_others(folder: Path) -> None:
    """Until the process of a comparison that was killed has left the folder."""
    limit = time.monotonic() + _PATIENCE
    while (holder := RunFolder(folder).holder()) is not None:
        if time.monotonic() > limit:
            raise OSError(f"{folder} is in use by {holder}: wait for it or stop it, or name another --output")
        time.sleep(_POLL)
