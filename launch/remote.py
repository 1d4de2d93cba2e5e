"""What `xla_dist.py` runs on every host: one command, watched, and gone when the launcher is.

`xla_dist.py` sends this file's text over ssh's standard input, so that a host needs nothing but Python 3.8 or later,
and no secret shows in a list of processes. Then the same pipe carries one line for each wish of the launcher:

    ping            I am still here
    stop SECONDS    ask the command to end (SIGTERM), and kill it after so long
    kill            kill it now

A closed pipe, or none of these for `lease` seconds, is as good as "stop": a command never outlives its launcher
unknowingly, however the connection ended.

Owns: the lock that keeps a host to one command, the command's environment and output, its end and that of its
children. Does not own: what other hosts do (`workers`).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO

NO_FOLDER, BUSY, NOT_EXECUTABLE, NOT_FOUND = 72, 73, 126, 127
"""Exit statuses: the folder to work in is not there; another command holds the host; as a shell says the other two."""
POLL = 0.05
SWEEP = 10.0
"""Seconds that are left to children of a command that has ended, before they are killed."""
_INPUT = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
"""Unbuffered: a thread that waits in a buffer would block the interpreter's exit."""


def state_folder() -> str:
    """Where this user's lock and last output lie on a host; made if it is not there.

    Raises:
        PermissionError: somebody else made it.
    """
    folder = os.environ.get("XLA_DIST_STATE") or f"/tmp/xla_dist-{os.getuid()}"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.lstat(folder).st_uid != os.getuid():
        raise PermissionError(folder + " belongs to another user: remove it")
    return folder


class Lock:
    """The right to run a command on this host, for as long as this process lives."""

    def __init__(self, folder: str) -> None:
        self._file = open(os.path.join(folder, "lock"), "a+")  # noqa: SIM115

    def take(self, run: str, takeover: bool, patience: float) -> str | None:
        """None once it is held; otherwise a line about who holds it.

        Args:
            run: of the launcher; a command that the same launcher left behind is told to stop.
            takeover: any other command is, too.
            patience: seconds it has for that before it is killed.
        """
        if self._try():
            return None
        holder = self._holder()
        if not holder:
            # Whoever has just taken it has not yet written down who it is.
            time.sleep(1.0)
            holder = self._holder()
        if holder and (takeover or holder.get("run") == run):
            _kill(int(holder["pid"]), signal.SIGTERM)
            if self._wait(patience):
                return None
            _kill_group(int(holder.get("command_pid", 0)), signal.SIGKILL)
            _kill(int(holder["pid"]), signal.SIGKILL)
            if self._wait(5.0):
                return None
        run, pid, since, what = (holder.get(key, "?") for key in ("run", "command_pid", "since", "command"))
        return f"this host is busy with a command of run {run} (process {pid}, since {since}): {what}"

    def write(self, record: dict[str, Any]) -> None:
        """Tell others who holds it."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(record))
        self._file.flush()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() > end:
                return False
            time.sleep(POLL)
        return True

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            return dict(json.loads(self._file.read()))
        except ValueError:
            return {}


class Command:
    """The command, its children, and the time they have left."""

    def __init__(self, argv: list[str], folder: str, env: dict[str, str], log: BinaryIO) -> None:
        self._process = subprocess.Popen(
            argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        self.pid = self._process.pid
        self._kill_at: float | None = None
        self._relay = threading.Thread(target=self._copy_output, args=(log,), daemon=True)
        self._relay.start()

    def stop(self, grace: float) -> None:
        """Ask the command to end; its children are asked after it, so that it still has them while it saves."""
        kill_at = time.monotonic() + grace
        if self._kill_at is None:
            _kill(self.pid, signal.SIGTERM)
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)

    def wait(self) -> int:
        """Its exit status, as a shell counts them, once nothing of it is left."""
        while self._process.poll() is None:
            if self._late():
                _kill_group(self.pid, signal.SIGKILL)
            time.sleep(POLL)
        self._sweep()
        self._relay.join(5.0)
        code = self._process.returncode
        return 128 - code if code < 0 else code

    def _late(self) -> bool:
        return self._kill_at is not None and time.monotonic() >= self._kill_at

    def _sweep(self) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic() + SWEEP
        asked: set[int] = set()
        while True:
            left = _left_of(self.pid)
            for pid in left:
                if self._late():
                    _kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    asked.add(pid)
                    _kill(pid, signal.SIGTERM)
            _reap()
            if not left:
                return
            time.sleep(POLL)

    def _copy_output(self, log: BinaryIO) -> None:
        """To the launcher while it listens, and to a file on this host: a broken pipe must not end the command."""
        output, listening = self._process.stdout, True
        assert output is not None
        while True:
            block = os.read(output.fileno(), 1 << 16)
            if not block:
                return
            log.write(block)
            log.flush()
            if listening:
                listening = _say(block)


def main(order: dict[str, Any]) -> int:
    """Run one command as `order` says, and return its exit status."""
    status = _run(order)
    # ssh speaks of its own failures by 255.
    status = 254 if status == 255 else status
    _say(f"\x1exla_dist {order['nonce']} exit {status}\n".encode())
    return status


def _run(order: dict[str, Any]) -> int:
    folder = os.path.expanduser(order["workdir"])
    if not os.path.isdir(folder):
        return _refuse(NO_FOLDER, f"{folder} is not there: run launch/setup.sh, or name another folder by --workdir")
    state = state_folder()
    lock = Lock(state)
    busy = lock.take(order["run"], order["takeover"], order["patience"])
    if busy:
        return _refuse(BUSY, busy + " (--takeover stops it)")
    _adopt_orphans()
    env = dict(os.environ, **order["env"])
    programs = os.path.join(folder, ".venv", "bin")
    if os.path.isdir(programs):
        env.update(VIRTUAL_ENV=os.path.dirname(programs), PATH=programs + os.pathsep + env.get("PATH", os.defpath))
    argv = [str(word) for word in order["argv"]]
    with open(os.path.join(state, "output.log"), "wb") as log:
        # The child looks its program up in the PATH of this process.
        os.environ["PATH"] = env.get("PATH", os.defpath)
        try:
            command = Command(argv, folder, env, log)
        except FileNotFoundError:
            return _refuse(NOT_FOUND, f"{argv[0]}: no such command on this host")
        except OSError as error:
            return _refuse(NOT_EXECUTABLE, f"{argv[0]}: {error.strerror}")
        lock.write(
            {"run": order["run"], "pid": os.getpid(), "command_pid": command.pid, "command": " ".join(argv)[:200],
             "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
        )  # fmt: skip
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: command.stop(order["grace"]))
        listener = Listener(command, order["grace"], order["lease"])
        listener.start()
        status = command.wait()
        lock.write({})
        return status


class Listener(threading.Thread):
    """Does what the launcher says, and stops the command when it says nothing any more."""

    def __init__(self, command: Command, grace: float, lease: float) -> None:
        super().__init__(daemon=True)
        self._command, self._grace, self._lease = command, grace, lease
        self._heard = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def run(self) -> None:
        while True:
            line = _INPUT.readline()
            if not line:
                break
            self._heard = time.monotonic()
            words = line.split()
            if words[:1] == [b"stop"]:
                self._command.stop(float(words[1]))
            elif words[:1] == [b"kill"]:
                self._command.stop(0.0)
        self._command.stop(self._grace)

    def _watch(self) -> None:
        while time.monotonic() - self._heard < self._lease:
            time.sleep(min(1.0, self._lease / 4))
        _say(f"xla_dist: nothing was heard of the launcher for {self._lease:.0f} s: stopping\n".encode())
        self._command.stop(self._grace)


def _say(block: bytes) -> bool:
    """Write to the launcher; False where it is gone."""
    view = memoryview(block)
    try:
        while view:
            view = view[os.write(1, view) :]
    except OSError:
        return False
    return True


def _refuse(status: int, line: str) -> int:
    _say(f"xla_dist: {line}\n".encode())
    return status


def _kill(pid: int, number: int) -> None:
    try:
        if abs(pid) > 1:
            os.kill(pid, number)
    except OSError:
        pass


def _kill_group(group: int, number: int) -> None:
    try:
        if group > 1:
            os.killpg(group, number)
    except OSError:
        pass


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _adopt_orphans() -> None:
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a command's children leave behind becomes ours, to be ended


def _left_of(group: int) -> list[int]:
    """Processes of the command's group, and orphans of it that made groups of their own; none that only wait to be
    counted."""
    if sys.platform != "linux":
        try:
            os.killpg(group, 0)
        except OSError:
            return []
        return [-group]
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, parent, its_group = file.read().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if state not in "ZX" and (int(its_group) == group or int(parent) == os.getpid()):
                found.append(int(name))
    return found


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
