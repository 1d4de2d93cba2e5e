"""A plan in words: tables for a terminal, a page, a file.

Owns: which numbers are shown and how. Does not own: the numbers (`plan`).
"""

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dalle_torch.storage.atomic import atomic_file
from dalle_torch.studies.pod_plan.chips import GIB
from dalle_torch.studies.pod_plan.plan import PodPlan, StepPlan
from dalle_torch.studies.pod_plan.roofline import Estimate
from dalle_torch.studies.pod_plan.work import Work

Row = Sequence[str]
SHOWN = 24
"""Collectives in a table; all of them are in the file."""


def as_text(plan: PodPlan) -> str:
    """The plan as a terminal shows it."""
    parts = [f"{title}\n{_aligned([head, *rows])}" for title, head, rows in _tables(plan)]
    return "\n\n".join(["\n".join(_heading(plan)), *parts, "\n".join(_remarks(plan))])


def write_plan(plan: PodPlan, folder: Path) -> None:
    """`plan.json` and `plan.html` in `folder`, each whole or not at all."""
    with atomic_file(folder / "plan.json") as path:
        path.write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    with atomic_file(folder / "plan.html") as path:
        path.write_text(_page(plan), encoding="utf-8")


def compare_text(plans: Sequence[tuple[str, PodPlan | str]]) -> str:
    """Plans beside each other, each with what it is of; in the place of one that cannot be, why."""
    rows: list[Row] = [
        ("", "fits", "peak GiB", "arguments", "temporaries", "sent GB", "s a step", "limit", "utilisation")
    ]
    for name, plan in plans:
        if isinstance(plan, str):
            rows.append((name, f"cannot be: {plan}"))
            continue
        mean, worst = plan.estimate, max(plan.steps, key=lambda step: step.memory.get("peak", 0))
        if not plan.fits:
            needed = next(step.needed for step in plan.steps if not step.fits)
            rows.append((name, f"no: needs {needed}"))
            continue
        memory = (_gib(plan.peak), _gib(worst.memory["argument"]), _gib(worst.memory["temp"]))
        if mean is None:
            rows.append((name, "yes", *memory, *"----"))
            continue
        sent = max(sum(one.moved for one in step.collectives) for step in plan.steps)
        rows.append(
            (
                name,
                "yes",
                *memory,
                f"{sent / 1e9:.2f}",
                f"{mean.least:.2f} to {mean.most:.2f}",
                mean.limit,
                f"{plan.utilisation(mean.least):.0%} to {plan.utilisation(mean.most):.0%}",
            )
        )
    return _aligned(rows)


def _heading(plan: PodPlan) -> list[str]:
    chip = plan.topology.chip
    return [
        f"topology  {plan.topology.name}, to libtpu {plan.topology.of_libtpu}",
        f"mesh      {plan.mesh}",
        f"batch     {plan.batches}",
        f"chip      {chip.name}: {chip.tflops:g} TFLOP/s in bfloat16, {chip.memory / GIB:g} GiB at "
        f"{chip.memory_rate / 1e9:g} GB/s, links {chip.link_rate / 1e9:g} GB/s, published; {chip.cores} "
        f"{'device' if chip.cores == 1 else 'devices'} a chip",
        "All numbers are of one device, and compiled for it, but for estimates, which are called so.",
    ]


def _tables(plan: PodPlan) -> list[tuple[str, Row, list[Row]]]:
    """(title, head, rows) of each table."""
    found: list[tuple[str, Row, list[Row]]] = [
        ("memory, GiB", ("", *(step.kind for step in plan.steps)), _memory(plan))
    ]
    if any(step.fits for step in plan.steps):
        found.append(("work and time", ("", *(step.kind for step in plan.steps)), _work(plan)))
    for step in plan.steps:
        if step.work is not None:
            head = ("kind", "axis", "devices", "times", "MB each", "MB sent", "what", "where")
            hidden = len(step.collectives) - SHOWN
            more = f", the first {SHOWN} of {len(step.collectives)}" if hidden > 0 else ""
            found.append((f"collectives of a step {step.kind}{more}", head, _collectives(step)))
    return found


def _memory(plan: PodPlan) -> list[Row]:
    kinds = list(dict.fromkeys(kind for step in plan.steps for kind in step.inputs))
    rows: list[Row] = [(f"  {kind}", *(_gib(step.inputs.get(kind, 0)) for step in plan.steps)) for kind in kinds]
    names = {"argument": "arguments", "temp": "temporaries", "generated_code": "code", "peak": "peak"}
    rows += [
        (label, *(_gib(step.memory[name]) if step.fits else "-" for step in plan.steps))
        for name, label in names.items()
    ]
    there = plan.topology.chip.core_memory
    rows.append(("there is", *(_gib(there) for _ in plan.steps)))
    rows.append(("fits", *("yes" if step.fits else f"no, {step.needed} of {step.available}" for step in plan.steps)))
    return rows


def _work(plan: PodPlan) -> list[Row]:
    def row(label: str, of: Callable[[Work, Estimate, StepPlan], str]) -> Row:
        cells = [of(step.work, step.estimate, step) if step.work and step.estimate else "-" for step in plan.steps]
        return (label, *cells)

    return [
        row("matrix products, TFLOP", lambda work, _, __: f"{work.flops / 1e12:.2f}"),
        row("the same in passes of bfloat16", lambda work, _, __: f"{work.passes / 1e12:.2f}"),
        row("memory traffic, GB", lambda work, _, __: f"{work.bytes / 1e9:.1f}"),
        row("sent to other devices, GB", lambda _, __, step: f"{sum(one.moved for one in step.collectives) / 1e9:.2f}"),
        row("estimate: arithmetic, s", lambda _, time, __: f"{time.arithmetic:.3f}"),
        row("estimate: memory, s", lambda _, time, __: f"{time.memory:.3f}"),
        row("estimate: links, s", lambda _, time, __: f"{time.links:.3f}"),
        row("estimate: step, s", lambda _, time, __: f"{time.least:.3f} to {time.most:.3f}"),
        row("longest of these", lambda _, time, __: time.limit),
        row("compiled in, s", lambda _, __, step: f"{step.compile_seconds:.0f}"),
        row("compiler's memory, GiB", lambda _, __, step: _gib(step.compile_bytes)),
    ]


def _collectives(step: StepPlan) -> list[Row]:
    return [
        (
            one.kind,
            one.axis,
            str(one.group),
            str(one.times),
            f"{one.bytes / 1e6:.2f}",
            f"{one.moved / 1e6:.1f}",
            _short(one.shape, 48),
            _short(one.layer, 72),
        )
        for one in step.collectives[:SHOWN]
    ]


def _remarks(plan: PodPlan) -> list[str]:
    found = []
    mean = plan.estimate
    if mean is not None:
        every = f", of which one in {plan.roots_every} takes roots" if plan.roots_every else ""
        found.append(
            f"An update takes {mean.least:.3f} s at least and {mean.most:.3f} s if nothing overlaps (estimate{every}): "
            f"{plan.utilisation(mean.least):.0%} to {plan.utilisation(mean.most):.0%} model flops utilisation."
        )
    for step in plan.steps:
        if not step.fits:
            found.append(f"The step {step.kind} does not fit: it needs {step.needed} of {step.available}.")
            found += [f"  largest: {tensor}" for tensor in step.largest]
            found += [f"  would help: {setting}" for setting in step.advice]
        if step.unread:
            found.append(
                f"The program of the step {step.kind} cannot be read here ({step.unread}): its memory is the "
                f"compiler's, its work and collectives are not known."
            )
        if step.unknown_loops:
            found.append(
                f"Of {step.unknown_loops} loops of the step {step.kind} the turns are not known: they count once."
            )
    return found


def _page(plan: PodPlan) -> str:
    body = "".join(f"<p>{html.escape(line)}</p>" for line in _heading(plan))
    for title, head, rows in _tables(plan):
        cells = "".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
            for tag, row in (("th", head), *(("td", row) for row in rows))
        )
        body += f"<h2>{html.escape(title)}</h2><table>{cells}</table>"
    body += "".join(f"<p>{html.escape(line)}</p>" for line in _remarks(plan))
    title = html.escape(f"Plan for {plan.topology.name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:90em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child,td:nth-child(n+7),th:nth-child(n+7){text-align:left}h2{font-size:1.1em}"
)


def _aligned(rows: Sequence[Row]) -> str:
    """Columns, the first and those of words to the left; a row that is shorter than the others is a sentence."""
    columns = max(map(len, rows))
    whole = [row for row in rows if len(row) == columns]
    widths = [max(len(row[column]) for row in whole) for column in range(columns)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 or (columns == 8 and column > 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / GIB:.3f}"


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
