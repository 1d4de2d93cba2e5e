"""Requests to stop that come from outside: Ctrl-C, SIGTERM, a machine that is about to be taken away.

Owns: turning them into a word that the loop looks at between updates. Does not own: what is done about them (`loop`).
"""

import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dalle_torch.log import get_logger

logger = get_logger(__name__)

PREEMPTION_INTERVAL = 2.0
"""Seconds between looks at the metadata server."""
EXIT_STATUS = {"finished": 0, "stopped": 0, "interrupted": 130, "terminated": 143, "preempted": 143}
"""Of the process, by how a run ended; above 128 as a shell reports the signals."""


class StopRequest:
    """The first request to stop, if there was one.

    Attributes:
        reason: "interrupted" (Ctrl-C), "terminated" (SIGTERM), "preempted", or None.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._closed = threading.Event()

    def ask(self, reason: str) -> None:
        """Ask the loop to stop; the first reason stays."""
        self.reason = self.reason or reason


@contextmanager
def stop_requests(watch_preemption: bool = False) -> Iterator[StopRequest]:
    """A request that Ctrl-C and SIGTERM make instead of ending the program; a second Ctrl-C ends it.

    Off the main thread, where Python allows no handlers, signals do what they did.

    Args:
        watch_preemption: ask the metadata server of a Google Cloud VM whether it is about to be taken away. A TPU VM
            that is preempted gets no signal.
    """
    request = StopRequest()
    handled: dict[int, object] = {}

    def interrupted(signum: int, frame: FrameType | None) -> None:
        if request.reason is not None:
            raise KeyboardInterrupt
        request.ask("interrupted")
        logger.warning("stopping after this update; Ctrl-C again stops at once and saves nothing")

    def terminated(signum: int, frame: FrameType | None) -> None:
        request.ask("terminated")

    if threading.current_thread() is threading.main_thread():
        handled = {
            signal.SIGINT: signal.signal(signal.SIGINT, interrupted),
            signal.SIGTERM: signal.signal(signal.SIGTERM, terminated),
        }
    if watch_preemption:
        threading.Thread(target=_watch, args=(request,), daemon=True, name="preemption").start()
    try:
        yield request
    finally:
        request._closed.set()
        for signum, before in handled.items():
            signal.signal(signum, before)  # type: ignore[arg-type]


def _watch(request: StopRequest) -> None:
    # The name that Google's own libraries read.
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    address = f"http://{host}/computeMetadata/v1/instance/preempted"
    asked = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    # The environment may name a proxy, which cannot reach the server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answered = False
    while not request._closed.wait(PREEMPTION_INTERVAL if answered else 0.0):
        try:
            with opener.open(asked, timeout=10) as answer:
                preempted = answer.read(16).strip().upper() == b"TRUE"
        except OSError as error:
            if not answered:
                logger.info("preemption is not watched: %s does not answer (%s)", host, error)
                return
            continue
        answered = True
        if preempted:
            logger.warning("this machine is about to be taken away: saving and stopping")
            request.ask("preempted")
            return
