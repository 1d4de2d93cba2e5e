"""The hosts of a pod during one attempt: a connection to each, their output, and the end of all when one fails.

gcloud can start a command on all hosts by one `ssh --worker=all`, but then their lines mix, and none can be told from
the others or be stopped. So there is one `ssh --worker=N` for each host, and over each the text of `remote`, which
watches the command there.

gcloud starts a command anew, up to ten times, when its connection breaks. A host says hello before it is told
anything, and is told once: a second hello is a lost connection, never a second run.

Owns: connections, prefixes, log files, signals passed on. Does not own: which TPU (`gcloud`), further attempts
(`xla_dist`).
"""

import collections
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from launch.gcloud import Tpu

LOST = 255
"""Status of a host that could not be reached, or whose connection broke; as ssh has it."""
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Statuses of a command that was told to stop, as by a TPU's notice of preemption; on other hosts it may be saving."""
PEERS_LOST = 69
"""Status of `dalle-torch train` on a host whose run has lost another host: the cause is to be looked for there."""
CAUSE_WITHIN = 5.0
"""Seconds in which that other host is heard of, after one that has lost it."""
TAIL = 40
PING_EVERY = 20.0
_LIMIT = 1 << 16
_PROGRAM = Path(__file__).with_name("remote.py")
_BOOT = (
    "import sys,os,json;os.write(1,('\\x1exla_dist %s hello\\n'%sys.argv[1]).encode());"
    "line=open(0,'rb',buffering=0,closefd=False).readline();order=json.loads(line or b'null') or sys.exit(1);"
    "space={'__name__':'remote'};exec(compile(order.pop('program'),'remote.py','exec'),space);"
    "sys.exit(space['main'](order))"
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What every host of an attempt is told.

    Attributes:
        argv: the command, word by word; no shell reads it.
        env: for each host, what is laid over its environment.
        workdir: folder on the hosts; ~ is the home there. Its `.venv`, if it has one, is the first to be looked in.
        run: of the launcher; tells its own leftovers from others' commands.
        grace: seconds between SIGTERM and SIGKILL when the launcher is stopped or gone.
        failure_grace: the same where another host has failed, and there is nothing left to agree on.
        failure_pause: seconds that the others go on after a host has failed.
        lease: seconds without a word of the launcher after which a host stops by itself.
        takeover: stop what else runs on a host.
    """

    argv: Sequence[str]
    env: Sequence[Mapping[str, str]]
    workdir: str
    run: str
    grace: float = 600.0
    failure_grace: float = 30.0
    failure_pause: float = 0.0
    lease: float = 600.0
    takeover: bool = False

    def line(self, worker: int, nonce: str) -> bytes:
        """It all in one line."""
        fields = {
            "program": _PROGRAM.read_text(encoding="utf-8"),
            "argv": list(self.argv),
            "env": dict(self.env[worker]),
            "workdir": self.workdir,
            "run": self.run,
            "nonce": nonce,
            "grace": self.grace,
            "patience": self.grace if self.takeover else self.failure_grace,
            "lease": self.lease,
            "takeover": self.takeover,
        }
        return json.dumps(fields).encode() + b"\n"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    kind: Literal["done", "failed", "stopped"]
    status: int = 0
    worker: int | None = None
    """The first that failed."""
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Interrupts:
    """Signals to the launcher, counted; the first asks hosts to stop, the second kills."""

    count: int = 0
    last: int = 0
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.count += 1
        self.last = number

    @property
    def status(self) -> int:
        """What a shell calls a process that this signal ended."""
        return 128 + (self.last or signal.SIGINT)

    def sleep(self, seconds: float) -> None:
        """Returns early when a signal comes."""
        end = time.monotonic() + seconds
        while not self.count and time.monotonic() < end:
            time.sleep(min(0.1, seconds))


class Worker:
    """The connection to one host."""

    def __init__(
        self, index: int, tpu: Tpu, order: Order, log: Path, show: Callable[[int, str], None], events: Any
    ) -> None:
        self.index, self._order, self._show, self._events = index, order, show, events
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.status: int | None = None
        """The command's, once it has ended."""
        self.closed = False
        self.told = False
        self._nonce = os.urandom(8).hex()
        self._marker = re.compile(rf"\x1exla_dist {self._nonce} (hello|exit (\d+))$")
        self._log: IO[str] = log.open("a", encoding="utf-8", buffering=1)
        words = tpu.ssh(index, shlex.join(["python3", "-u", "-c", _BOOT, self._nonce]))
        # Sessions of their own: a terminal's Ctrl-C is for the launcher, which passes it on as it should be.
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, wish: str) -> None:
        """One line to the host; nothing happens where it cannot be heard."""
        if self.told:
            self._write(wish.encode() + b"\n")

    def hang_up(self) -> None:
        """End the connection at once; the host finds out, and stops its command."""
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def start(self) -> bool:
        """Give the order to the host that has said hello; False where it was given before."""
        if self.told:
            return False
        self.told = True
        self._write(self._order.line(self.index, self._nonce))
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        return True

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            while data:
                data = data[os.write(self._process.stdin.fileno(), data) :]

    def _read(self) -> None:
        output = self._process.stdout
        assert output is not None
        with self._log:
            while raw := output.readline(_LIMIT):
                text = raw.decode("utf-8", "replace").rstrip("\r\n")
                if found := self._marker.search(text):
                    text = text[: found.start()]
                    if found[2] is not None:
                        self.status = int(found[2])
                    else:
                        self._events.put((self.index, "hello"))
                    if not text:
                        continue
                self._log.write(f"{text}\n")
                self.tail.append(text)
                self._show(self.index, text)
        self._process.wait()
        self.closed = True
        self._events.put((self.index, "closed"))

    @property
    def reason(self) -> str:
        """Why it ended."""
        if self.status is not None:
            return f"ended with status {self.status}"
        return "lost its connection" if self.told else "could not be reached"


class Pod:
    """All hosts, during one attempt."""

    def __init__(self, tpu: Tpu, order: Order, log_dir: Path, show: Callable[[int, str], None] | None = None) -> None:
        self._order = order
        self._show = show or print_line
        self._logs = [log_dir / f"worker-{index:03d}.log" for index in range(len(order.env))]
        self._events: queue.Queue[tuple[int, str]] = queue.Queue()
        self._stop_at = 0.0
        self._deadline: float | None = None
        self._failure: Outcome | None = None
        self._begin = time.monotonic()
        self._workers = [
            Worker(index, tpu, order, log, self._show, self._events) for index, log in enumerate(self._logs)
        ]

    def run(self, interrupts: Interrupts, time_limit: float | None = None) -> Outcome:
        """Return when no host runs anything any more."""
        pinged, asked = time.monotonic(), 0
        while not all(worker.closed for worker in self._workers):
            with suppress(queue.Empty):
                self._handle(*self._events.get(timeout=0.1))
            now = time.monotonic()
            if interrupts.count > asked:
                asked = interrupts.count
                self._interrupt(asked)
            if time_limit is not None and self._failure is None and now - self._begin > time_limit:
                self._fail(Outcome("failed", LOST, None, f"not all hosts were done after {time_limit:.0f} s"))
            if self._failure is not None and self._deadline is None and now >= self._stop_at:
                saving = self._failure.status in STOPPED
                self._stop(self._order.grace if saving else self._order.failure_grace)
            if now - pinged > min(PING_EVERY, self._order.lease / 4):
                pinged = now
                self._tell("ping")
            if self._deadline is not None and now > self._deadline:
                self._hang_up()
        while not self._events.empty():
            self._handle(*self._events.get())
        return self._outcome(interrupts)

    def _handle(self, index: int, event: str) -> None:
        worker = self._workers[index]
        if event == "hello" and not worker.start():
            say(f"worker {index} came back after its connection broke; what it ran stops by itself")
            worker.hang_up()
        if event == "hello" and self._deadline is not None:
            worker.hang_up()
        if event == "closed" and self._deadline is None and worker.status != 0:
            status = LOST if worker.status is None else worker.status
            outcome = Outcome("failed", status, index, worker.reason)
            if self._failure is None:
                say(f"worker {index} {worker.reason}: stopping all {len(self._workers)}")
                self._fail(outcome)
            elif self._failure.status == PEERS_LOST != status:
                say(f"worker {index} {worker.reason}: that is why")
                self._fail(outcome)

    def _fail(self, outcome: Outcome) -> None:
        self._failure = outcome
        pause = self._order.failure_pause
        self._stop_at = time.monotonic() + (max(pause, CAUSE_WITHIN) if outcome.status == PEERS_LOST else pause)

    def _interrupt(self, count: int) -> None:
        if count == 1:
            say(
                f"asking {len(self._workers)} hosts to stop; they have {self._order.grace:.0f} s to save "
                f"(once more kills them)"
            )
            self._stop(self._order.grace)
        else:
            say("killing what runs on the hosts")
            self._tell("kill")
            self._deadline = time.monotonic() + 10.0

    def _stop(self, grace: float) -> None:
        self._tell(f"stop {grace}")
        for worker in self._workers:
            if not worker.told:
                worker.hang_up()
        self._deadline = time.monotonic() + grace + 30.0

    def _tell(self, wish: str) -> None:
        for worker in self._workers:
            worker.tell(wish)

    def _hang_up(self) -> None:
        silent = [worker for worker in self._workers if not worker.closed]
        self._deadline = time.monotonic() + 10.0
        if silent:
            say(
                f"no answer of worker {', '.join(str(worker.index) for worker in silent)}: hanging up; a command that "
                f"may still run there is stopped by the host in at most {self._order.lease + self._order.grace:.0f} s"
            )
        for worker in silent:
            worker.hang_up()

    def _outcome(self, interrupts: Interrupts) -> Outcome:
        seconds = time.monotonic() - self._begin
        failure = self._failure
        if failure is not None:
            if failure.worker is not None:
                self._show_tail(self._workers[failure.worker])
            return Outcome("failed", failure.status, failure.worker, failure.reason, seconds)
        if interrupts.count:
            ended = [f"{worker.index} {worker.reason}" for worker in self._workers if worker.status is None]
            if ended:
                say("not known how it ended: worker " + ", ".join(ended))
            return Outcome("stopped", interrupts.status, seconds=seconds)
        return Outcome("done", seconds=seconds)

    def _show_tail(self, worker: Worker) -> None:
        say(f"worker {worker.index} {worker.reason}; its last lines ({self._logs[worker.index]}):")
        with suppress(OSError, ValueError):
            print("".join(f"    {line}\n" for line in worker.tail), end="", file=sys.stderr, flush=True)


_printing = threading.Lock()


def print_line(worker: int, text: str) -> None:
    """A line of a host, on this terminal."""
    # A reader that has gone (`| head`, a closed terminal) must not end the run.
    with _printing, suppress(OSError, ValueError):
        print(f"[worker {worker}] {text}", flush=True)


def say(text: str) -> None:
    """A line of the launcher's own."""
    with _printing, suppress(OSError, ValueError):
        print(f"xla_dist: {text}", file=sys.stderr, flush=True)
