"""What hosts said of themselves in a preflight, as one table that shows where they differ.

Owns: reading their lines, comparing, the table. Does not own: the questions (`preflight`). Standard library only.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from launch.workers import print_line

MARK = "PREFLIGHT "
OWN = ("host", "process", "free_gb")
"""Facts that each host has of its own."""
MAX_CLOCK_GAP = 5.0
"""Seconds; a token for a bucket is refused at five minutes, and logs are hard to put in order long before."""
_WIDTH = 60


class Reports:
    """The latest report of each of so many hosts."""

    def __init__(self, hosts: int) -> None:
        self._hosts = hosts
        self._facts: dict[int, dict[str, Any]] = {}
        self._problems: dict[int, list[str]] = {}
        self._clock: dict[int, float] = {}

    def read(self, worker: int, line: str) -> None:
        """A line of a host: its report, or something else that is shown as it is."""
        if not line.startswith(MARK):
            print_line(worker, line)
            return
        found = json.loads(line.removeprefix(MARK))
        self._facts[worker], self._problems[worker] = found["facts"], found["problems"]
        self._clock[worker] = found["time"] - time.time()

    def problems(self) -> list[str]:
        """One line for each: of hosts that are silent, of what hosts found themselves, and of what differs."""
        silent = [worker for worker in range(self._hosts) if worker not in self._facts]
        found = [f"worker {spans(silent)} did not report"] if silent else []
        same: dict[str, list[int]] = {}
        for worker, problems in sorted(self._problems.items()):
            for problem in problems:
                same.setdefault(problem, []).append(worker)
        found += [f"worker {spans(workers)}: {problem}" for problem, workers in same.items()]
        for name in self._names():
            values = self._values(name)
            usual, *others = sorted(values, key=lambda value: -len(values[value]))
            if name not in OWN:
                found += [
                    f"worker {spans(values[value])}: {name} is {value}, and {usual} on {spans(values[usual])}"
                    for value in others
                    if not self._explained(name, values[value]) and not self._explained(name, values[usual])
                ]
        processes = Counter(facts["process"] for facts in self._facts.values() if facts.get("process") is not None)
        found += [f"{count} hosts call themselves process {index}" for index, count in processes.items() if count > 1]
        if self._clock and self._gap() > MAX_CLOCK_GAP:
            ahead, behind = max(self._clock, key=self._clock.__getitem__), min(self._clock, key=self._clock.__getitem__)
            found.append(
                f"clocks of worker {behind} and {ahead} are {self._gap():.0f} s apart: check their time service"
            )
        return found

    def table(self) -> str:
        """A row for each value of each check, with the hosts that have it; "!" before what only some have."""
        rows = [("", "check", "value", "workers")]
        for name in self._names():
            values = self._values(name)
            if name in OWN:
                rows.append(("", name, self._spread(name), spans(self._facts)))
                continue
            first, *others = sorted(values, key=lambda value: -len(values[value]))
            rows.append(("", name, first, spans(values[first])))
            rows += [("!", "", value, spans(values[value])) for value in others]
        if self._clock:
            rows.append(("", "clock gap", f"{self._gap():.1f} s", spans(self._clock)))
        silent = [worker for worker in range(self._hosts) if worker not in self._facts]
        if silent:
            rows.append(("!", "no report", "-", spans(silent)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for _, facts in sorted(self._facts.items()) for name in facts))

    def _values(self, name: str) -> dict[str, list[int]]:
        values: dict[str, list[int]] = {}
        for worker, facts in sorted(self._facts.items()):
            value = facts.get(name)
            values.setdefault("-" if value is None else _short(str(value)), []).append(worker)
        return values

    def _explained(self, name: str, workers: list[int]) -> bool:
        """Whether these hosts say themselves why they have no such fact."""
        return all(any(line.startswith(f"{name}: ") for line in self._problems[worker]) for worker in workers)

    def _spread(self, name: str) -> str:
        values = [facts[name] for facts in self._facts.values() if facts.get(name) is not None]
        if not values:
            return "-"
        if isinstance(values[0], str):
            return _short(f"{values[0]}, ..." if len(values) > 1 else values[0])
        return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"

    def _gap(self) -> float:
        return max(self._clock.values()) - min(self._clock.values())


def spans(workers: Iterable[int]) -> str:
    """Numbers of hosts, runs of them drawn together: "0-6, 8"."""
    runs: list[list[int]] = []
    for worker in sorted(workers):
        if runs and worker == runs[-1][-1] + 1:
            runs[-1].append(worker)
        else:
            runs.append([worker])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
