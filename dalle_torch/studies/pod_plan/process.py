"""The process that compiles (`compiler`), as the others call it.

Owns: its arguments and answers, whose interpreter runs it, what a failure means. Does not own: what it does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dalle_torch.parallel.trace import TracedStep
from dalle_torch.studies.pod_plan.chips import Topology

INSTALL = "pip install 'dalle-torch[plan]'"
_COMPILER = Path(__file__).with_name("compiler.py")
_MISSING, _UNKNOWN_TOPOLOGY, _UNREADABLE = 3, 4, 5


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step, for one core.

    Attributes:
        seconds, host_bytes: that it took.
        memory: bytes by kind: argument, output, alias, temp, generated_code, peak. Empty if it did not fit.
        cost: XLA's own count of flops and bytes, each loop's body once.
        text: the program of a core; empty if it did not fit or cannot be read.
        out_of_memory: what the compiler says if the step does not fit.
        unread: why the program cannot be read, if so.
    """

    seconds: float
    host_bytes: int
    memory: dict[str, int]
    cost: dict[str, float]
    text: str
    out_of_memory: str | None
    unread: str | None = None


def hosts_of(topology: Topology, python: str | None = None) -> list[list[int]]:
    """For each host of `topology` the numbers of its devices.

    Raises:
        ValueError: libtpu does not know it, or the compiler is not installed.
    """
    answer = _run([*_command(python), "topology", topology.of_libtpu], topology)
    of_hosts: dict[int, list[int]] = {}
    for number, host, _ in json.loads(answer.splitlines()[-1]):
        of_hosts.setdefault(host, []).append(number)
    hosts = [of_hosts[host] for host in sorted(of_hosts)]
    if (found := sum(map(len, hosts))) != topology.devices:
        raise ValueError(f"topology {topology.name} has {topology.devices} devices, and libtpu finds {found}")
    return hosts


def compile_step(step: TracedStep, topology: Topology, folder: Path, python: str | None = None) -> Compiled:
    """Compile `step` for `topology`: minutes, and gigabytes of memory.

    Args:
        folder: for the files that the processes exchange; `program.txt` in it is what the compiler made.

    Raises:
        ValueError: libtpu does not know the topology, or the compiler is not installed.
        RuntimeError: it failed otherwise.
    """
    (folder / "step.pb").write_bytes(step.program)
    request = {
        "program": str(folder / "step.pb"),
        "topology": topology.of_libtpu,
        "devices": step.devices,
        "inputs": [asdict(entry) for entry in step.inputs],
        "outputs": step.outputs,
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    _run([*_command(python), "compile", str(folder / "request.json"), str(folder)], topology)
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    program, executable = folder / "program.txt", folder / "executable.bin"
    if executable.is_file():
        reason = _take_out(executable, topology, python)
        answer["unread"] = f"{answer['unread']}; {reason}" if reason else None
    return Compiled(
        seconds=answer["seconds"],
        host_bytes=answer["host_bytes"],
        memory=answer.get("memory", {}),
        cost=answer.get("cost", {}),
        text=program.read_text(encoding="utf-8") if program.is_file() else "",
        out_of_memory=answer.get("out_of_memory"),
        unread=answer.get("unread"),
    )


def _take_out(executable: Path, topology: Topology, python: str | None) -> str | None:
    """XLA's text of the program inside an executable, beside it; if it cannot be had, why."""
    program = executable.with_name("program.pb")
    try:
        # Of the extra, like the compiler, which may be another interpreter's.
        from dalle_torch.studies.pod_plan.executable import program_of

        program.write_bytes(program_of(executable.read_bytes()))
        _run([*_command(python), "text", str(program), str(executable.parent)], topology)
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def _command(python: str | None) -> list[str]:
    return [python or sys.executable, str(_COMPILER)]


def _run(command: Sequence[str], topology: Topology) -> str:
    # The compiler ends when nobody holds the other end of its input any more: this process, unless it was killed.
    reading, writing = os.pipe()
    try:
        done = subprocess.run(command, stdin=reading, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"the compiler's interpreter {command[0]} cannot be started: {error}") from error
    finally:
        os.close(reading)
        os.close(writing)
    if done.returncode == 0:
        return done.stdout
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == _MISSING:
        raise ValueError(f"a plan needs the compiler for TPUs, which {command[0]} does not have ({said}): {INSTALL}")
    if done.returncode == _UNKNOWN_TOPOLOGY:
        raise ValueError(f"topology {topology.name} ({topology.of_libtpu}) is not known to libtpu: {said}")
    if done.returncode == _UNREADABLE:
        raise ValueError(said)
    raise RuntimeError(f"the compiler ended with status {done.returncode}: {said}")
