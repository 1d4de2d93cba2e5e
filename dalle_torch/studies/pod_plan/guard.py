"""What became different between two plans of the same step: memory at its peak, and what the devices tell each other.

Owns: the comparison, over the files that plans are written to. Does not own: plans (`plan`).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Entry = tuple[str, str, str, str]
"""A collective's kind, axis, place in the step, and shape."""


def read_plan(path: Path) -> dict[str, Any]:
    """A `plan.json`.

    Raises:
        ValueError: it is not there, or is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _steps(found)
    except OSError as error:
        raise ValueError(f"there is no plan at {path} to compare with: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a plan.json of dalle-torch plan: {error!r}") from error
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is not as before; an empty list if nothing is."""
    found = list(_values("topology", before["topology"]["name"], now["topology"]["name"]))
    old, new = _steps(before), _steps(now)
    for kind in dict.fromkeys([*old, *new]):
        if kind not in old or kind not in new:
            found.append(f"step {kind}: only {'before' if kind in old else 'now'}")
            continue
        (peak, collectives), (peak_now, collectives_now) = old[kind], new[kind]
        found += _values(f"step {kind}: bytes at its peak", peak, peak_now)
        for entry in sorted(collectives.keys() | collectives_now.keys()):
            found += _values(
                f"step {kind}: times of {entry[0]} over {entry[1]}, {entry[3]}, {entry[2]}",
                collectives[entry],
                collectives_now[entry],
            )
    return found


def _values(what: str, before: Any, now: Any) -> Iterator[str]:
    if before != now:
        change = f" ({now / before - 1:+.1%})" if isinstance(before, int) and before and now else ""
        yield f"{what}: {before} before, {now} now{change}"


def _steps(plan: Mapping[str, Any]) -> dict[str, tuple[int, Counter[Entry]]]:
    """Of each kind of step the bytes at its peak (0: it did not fit), and how often there is each collective."""
    steps = {}
    for step in plan["steps"]:
        times: Counter[Entry] = Counter()
        for one in step["collectives"]:
            times[one["kind"], one["axis"], one["layer"], one["shape"]] += one["times"]
        steps[step["kind"]] = (step["memory"].get("peak", 0), times)
    return steps
