"""Start one command on every host of a TPU pod, watch it, and stop it everywhere when it fails anywhere.

    python launch/xla_dist.py --tpu NAME --zone ZONE [--env K=V] [--restart-on-failure N] -- COMMAND

torch_xla had a launcher of this name up to release 2.0; this one has its command line, and goes over gcloud's ssh. Each
host gets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as `torch.distributed.init_process_group("gloo")` reads them.

Exit status: 0; that of the command on the first host that failed, 255 where that host was lost; 130 after Ctrl-C and
143 after SIGTERM; 75 where the TPU is not READY (preempted, for one); 1 for gcloud's failures and a preflight with
problems; 2 for a misspelt command line.

Owns: the command line, waiting for the TPU, attempts. Does not own: connections (`workers`), gcloud (`gcloud`), what a
preflight asks (`preflight`) and how it is shown (`report`). Standard library only; nothing else needs to be installed.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.gcloud import GONE, GcloudError, Node, Tpu
from launch.report import Reports
from launch.workers import LOST, STOPPED, Interrupts, Order, Outcome, Pod, say

SUCCESS, FAILURE, USAGE, NOT_READY = 0, 1, 2, 75
HOPELESS = (2, 72, 126, 127)
"""Statuses of a command line that is wrong, and of a host that lacks the command or the folder: they do not go away."""
MAX_BACKOFF = 300.0


class NotReadyError(Exception):
    """The TPU is in no state to run anything."""


class Stopped(Exception):
    """A signal came while the launcher waited."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher; returns the exit status."""
    options, command = parse(sys.argv[1:] if argv is None else argv)
    with Interrupts() as interrupts:
        try:
            return Launcher(options, command, interrupts).run()
        except NotReadyError as error:
            say(str(error))
            return NOT_READY
        except Stopped:
            return interrupts.status
        except OSError as error:
            say(f"error: {error}")
            return FAILURE


class Launcher:
    """One run: attempts until the command is through, or may not be tried again."""

    def __init__(self, options: argparse.Namespace, command: list[str], interrupts: Interrupts) -> None:
        self._options, self._command, self._interrupts = options, command, interrupts
        self._tpu = Tpu(
            name=options.tpu, zone=options.zone, project=options.project, internal_ip=options.internal_ip,
            iap=options.iap, ssh_flags=tuple(options.ssh_flag),
        )  # fmt: skip
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        self._run = f"{stamp}-{os.urandom(3).hex()}"
        self._logs = Path(options.log_dir or f"runs/logs/{self._tpu.node}-{stamp}")

    def run(self) -> int:
        """The exit status."""
        node = self._ready_node()
        what = f"{self._tpu.node} in {self._tpu.zone}: {node.accelerator}, {len(node.addresses)} hosts"
        say(f"{what}; logs in {self._logs}")
        if self._options.preflight:
            status = self._preflight(node)
            if status != SUCCESS or not self._command:
                return status
        failures = attempt = 0
        while True:
            attempt += 1
            outcome = self._pod(node, self._order(node, self._command)).run(self._interrupts)
            if outcome.kind != "failed":
                return outcome.status
            if outcome.seconds > 60 * self._options.reset_after:
                failures = 0
            if not self._taken_away(outcome):
                failures += 1
                if failures > self._options.restart_on_failure or outcome.status in HOPELESS:
                    self._give_up(outcome, failures)
                    return outcome.status
                self._back_off(failures)
            node = self._ready_node()
            say(f"attempt {attempt + 1} on {len(node.addresses)} hosts")

    def _give_up(self, outcome: Outcome, failures: int) -> None:
        if self._options.restart_on_failure == 0:
            return
        why = (
            f"status {outcome.status} would come again"
            if outcome.status in HOPELESS
            else f"--restart-on-failure {self._options.restart_on_failure} is used up"
        )
        say(f"not started again: {why}")

    def _back_off(self, failures: int) -> None:
        pause = min(MAX_BACKOFF, self._options.backoff * 2.0 ** (failures - 1))
        say(f"failure {failures}; {self._options.restart_on_failure} are allowed: starting again in {pause:.0f} s")
        self._interrupts.sleep(pause)
        self._check_interrupts()

    def _check_interrupts(self) -> None:
        if self._interrupts.count:
            raise Stopped

    def _order(self, node: Node, command: Sequence[str]) -> Order:
        options, hosts = self._options, len(node.addresses)
        envs = [
            {
                "PYTHONUNBUFFERED": "1",
                "PJRT_DEVICE": "TPU",
                "RANK": str(index),
                "WORLD_SIZE": str(hosts),
                "MASTER_ADDR": node.addresses[0],
                "MASTER_PORT": str(options.master_port),
                **dict(options.env),
            }
            for index in range(hosts)
        ]
        return Order(
            argv=command, env=envs, workdir=options.workdir, run=self._run, grace=options.grace,
            failure_grace=options.failure_grace, lease=options.lease, takeover=options.takeover,
        )  # fmt: skip

    def _pod(self, node: Node, order: Order) -> Pod:
        self._logs.mkdir(parents=True, exist_ok=True)
        return Pod(self._tpu, order, self._logs)

    def _preflight(self, node: Node) -> int:
        options = self._options
        words = ["python", "launch/preflight.py", options.preflight, "--json"]
        words += [f"--output={options.output}"] if options.output else []
        words += ["--no-devices"] if options.no_devices else []
        reports = Reports(len(node.addresses))
        order = replace(self._order(node, words), grace=10.0, failure_grace=10.0, failure_pause=20.0)
        self._logs.mkdir(parents=True, exist_ok=True)
        outcome = Pod(self._tpu, order, self._logs, reports.read).run(self._interrupts, options.preflight_timeout)
        if outcome.kind == "stopped":
            return outcome.status
        unwell = f"worker {outcome.worker} {outcome.reason}" if outcome.worker is not None else outcome.reason
        print(reports.table())
        problems = [*reports.problems(), *([unwell] if outcome.kind == "failed" else [])]
        for problem in problems:
            print(f"problem: {problem}")
        print(f"preflight: {f'{len(problems)} problems' if problems else 'all is well'}", flush=True)
        return FAILURE if problems else SUCCESS

    def _taken_away(self, outcome: Outcome) -> bool:
        """Whether the TPU is not READY any more. Its hosts notice it first, so gcloud is asked for a while where they
        were lost or told to stop."""
        suspicious = outcome.status in (LOST, *STOPPED)
        end = time.monotonic() + (self._options.settle if suspicious else 0.0)
        while True:
            try:
                if not self._tpu.describe().ready:
                    return True
            except GcloudError as error:
                say(str(error))
            if time.monotonic() >= end:
                return False
            self._interrupts.sleep(3.0)
            self._check_interrupts()

    def _ready_node(self) -> Node:
        """The TPU once it is READY and has hosts, waited for as long as the options allow.

        Raises:
            NotReadyError: it is not, and was not within that time.
        """
        wait = 60 * self._options.wait_ready
        end, told = time.monotonic() + wait, ""
        while True:
            self._check_interrupts()
            try:
                node: Node | None = self._tpu.describe()
                state = node.state if node is not None else ""
            except GcloudError:
                # It is being made anew, perhaps.
                if not wait or time.monotonic() >= end:
                    raise
                node, state = None, "not there"
            if node is not None and node.ready and node.addresses:
                return node
            if time.monotonic() >= end:
                raise NotReadyError(not_ready(self._tpu, state, node.health if node else "", self._options.wait_ready))
            if state != told:
                told = state
                say(f"{self._tpu.node} is {state}: waiting up to {self._options.wait_ready:g} min for it to be READY")
            self._interrupts.sleep(min(15.0, wait / 10))


def not_ready(tpu: Tpu, state: str, health: str, waited: float) -> str:
    """One line: what a state means, and what to do."""
    place = f"{tpu.node} --zone={tpu.zone}"
    if state in ("PREEMPTED", "TERMINATED"):
        advice = (
            f"its machines were taken away; checkpoints are whole. Delete and make it again: launch/delete.sh and "
            f"launch/create.sh (--tpu {tpu.node} --zone {tpu.zone}), launch/setup.sh, then start the same command"
        )
    elif state in GONE:
        advice = f"start it by `gcloud compute tpus tpu-vm start {place}`, or make it anew"
    elif state == "READY":
        advice = "but gcloud names no hosts of it yet: try again in a minute"
    else:
        advice = "try again when it is READY, or wait for it by --wait-ready MINUTES"
    after = f" after {waited:g} min" if waited else ""
    return f"{tpu.node} is {state}{after}{f' ({health})' if health else ''}: {advice}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"xla_dist: error: {message} (see --help)\n")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, command): what stands before the first "--", and after it."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    command = words[cut + 1 :]
    parser = build_parser()
    options = parser.parse_args(words[:cut])
    if not command and not options.preflight:
        parser.error("no command: put it after --, as in -- dalle-torch train --config FILE")
    if options.internal_ip and options.iap:
        parser.error("--internal-ip and --iap are two ways to the hosts: take one")
    return options, command


def build_parser() -> argparse.ArgumentParser:
    """The options, before "--"."""
    summary, details = str(__doc__).split("\n\n", 1)
    parser = _Parser(
        prog="xla_dist.py", usage="%(prog)s --tpu NAME --zone ZONE [options] -- COMMAND", description=summary,
        epilog=details.split("\n\nOwns:")[0], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--tpu", required=True, metavar="[USER@]NAME", help="the TPU, as gcloud names it")
    add("--zone", required=True, help="its zone, such as europe-west4-a")
    add("--project", help="its project; gcloud's own setting if not given")
    add("--env", action="append", default=[], type=_variable, metavar="K[=V]",
        help="a variable for the command on every host; K alone takes the value it has here, which keeps secrets out "
        "of the shell's history; repeatable")  # fmt: skip
    add("--workdir", default="~/dalle-torch", help="folder on the hosts to run in; its .venv is used (%(default)s)")
    add("--log-dir", help="folder for a log file of each host (runs/logs/NAME-TIME)")
    add("--restart-on-failure", type=_count, default=0, metavar="N", help="start on all hosts again up to N times")
    add("--reset-after", type=_seconds, default=60.0, metavar="MIN",
        help="failures are counted anew after an attempt that lasted so many minutes (%(default)s)")  # fmt: skip
    add("--backoff", type=_seconds, default=10.0, metavar="S",
        help="pause before the first restart, doubled each time up to 300 s (%(default)s)")  # fmt: skip
    add("--wait-ready", type=_seconds, default=0.0, metavar="MIN",
        help="wait so many minutes for a TPU that is not READY, at the start and after a preemption, which does not "
        "count as a failure")  # fmt: skip
    add("--settle", type=_seconds, default=30.0, metavar="S",
        help="after a host was lost or told to stop, ask so long if the TPU was preempted (%(default)s)")  # fmt: skip
    add("--grace", type=_seconds, default=600.0, metavar="S",
        help="on Ctrl-C or SIGTERM hosts get SIGTERM, and SIGKILL after so many seconds or at a second Ctrl-C "
        "(%(default)s)")  # fmt: skip
    add("--failure-grace", type=_seconds, default=30.0, metavar="S",
        help="the same for the other hosts when one fails (%(default)s)")  # fmt: skip
    add("--lease", type=_positive, default=600.0, metavar="S",
        help="a host that hears nothing of the launcher for so long stops by itself (%(default)s)")  # fmt: skip
    add("--takeover", action="store_true", help="stop what another launcher runs on the hosts, instead of refusing")
    add("--master-port", type=_count, default=29500, metavar="PORT", help="MASTER_PORT (%(default)s)")
    add("--internal-ip", action="store_true", help="reach hosts by their internal addresses, from the same network")
    add("--iap", action="store_true", help="reach hosts through Identity-Aware Proxy (gcloud alpha)")
    add("--ssh-flag", action="append", default=[], metavar="FLAG", help="passed on to ssh, as --ssh-flag='-o A=B'")
    add("--preflight", metavar="CONFIG",
        help="check every host for a run of this file (a path on the hosts); without COMMAND, just that")  # fmt: skip
    add("--output", help="with --preflight: the run's folder or URL, checked to be writable from every host")
    add("--no-devices", action="store_true", help="with --preflight: leave the TPU alone")
    add("--preflight-timeout", type=_positive, default=600.0, metavar="S", help="%(default)s")
    return parser


def _variable(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not name or not name.replace("_", "a").isalnum() or name[0].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not K=V with a variable's name for K")
    if not given:
        if name not in os.environ:
            raise argparse.ArgumentTypeError(f"{name} is not set here: give a value as {name}=...")
        value = os.environ[name]
    return name, value


def _number(text: str, least: float, strictly: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf") or (strictly and value == least):
        raise argparse.ArgumentTypeError(f"{text!r} is no number {'above' if strictly else 'from'} {least:g} on")
    return value


def _seconds(text: str) -> float:
    return _number(text, 0.0)


def _positive(text: str) -> float:
    return _number(text, 0.0, strictly=True)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
