"""Results of runs as rows with their spread over seeds, set against the first row.

Owns: what is averaged, at equal steps and at equal seconds, and what may be called a difference. Does not own: reading
curves (`compare_measure`), pages and charts (`compare_report`).
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from dalle_torch.studies.compare_measure import Measured, divergence

COLUMNS = {
    "name": "row", "lr": "lr", "parameters": "parameters", "loss": "loss", "low": "lowest\nof the seeds",
    "high": "highest\nof the seeds", "against": "against\nthe first row", "verdict": "seeds that agree",
    "loss_at_seconds": "loss\nat equal seconds", "step_seconds": "s a step", "memory": "memory\nMiB", "seeds": "seeds",
    "trouble": "noticed",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run came to.

    Attributes:
        lr: highest learning rate.
        settings: all its options.
        memory: bytes that its process took beyond what it had when it started; None: not known.
        error: what ended it early; None for a run that did all its steps.
        fields: the whole `result.json`.
    """

    name: str
    row: str
    seed: int
    lr: float
    parameters: int
    measured: Measured
    memory: int | None
    error: str | None
    settings: Mapping[str, Any]
    fields: Mapping[str, Any]

    @classmethod
    def from_json(
        cls, name: str, row: str, seed: int, lr: float, settings: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> "Result":
        """Of a `result.json`. Raises KeyError for one that is not whole."""
        peak, start = fields["peak_memory"], fields["memory_at_start"]
        return cls(
            name=name, row=row, seed=seed, lr=lr, parameters=fields["parameters"],
            measured=Measured.from_json(fields["measured"]), error=fields["error"], settings=settings, fields=fields,
            memory=peak and (peak - start if fields["device"] == "cpu" else peak),
        )  # fmt: skip

    @property
    def final(self) -> float | None:
        """The evaluation loss after all steps; None where the run did not get there."""
        losses = self.measured.losses
        return losses[-1] if losses and self.error is None and math.isfinite(losses[-1]) else None

    @property
    def final_or_infinity(self) -> float:
        return math.inf if self.final is None else self.final


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A row over its seeds, at the best of its learning rates.

    Attributes:
        loss, low, high: mean, lowest and highest evaluation loss after all steps; None where no run got there.
        against: the mean over seeds of the difference to the first row's run with the same seed.
        verdict: how many seeds agree on the sign of that, in words.
        loss_at_seconds: the mean loss after the training time of the fastest row.
        rates: the losses of all learning rates that were tried, with the first seed.
        trouble: what went wrong, by run.
    """

    name: str
    lr: float
    parameters: int
    results: Sequence[Result]
    loss: float | None
    low: float | None
    high: float | None
    against: float | None
    verdict: str
    loss_at_seconds: float | None
    step_seconds: float | None
    memory: float | None
    rates: Mapping[float, float | None]
    trouble: Sequence[str]

    def cells(self) -> dict[str, str | int | float | None]:
        """By the keys of `COLUMNS`."""
        return {
            **{name: getattr(self, name) for name in COLUMNS if name not in ("seeds", "memory", "trouble")},
            "memory": None if self.memory is None else round(self.memory / 2**20),
            "seeds": len(self.results),
            "trouble": "; ".join(self.trouble),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows, in the order of the file.

    Attributes:
        chance: loss of a model that knows neither text nor picture.
        seconds: training time of the fastest row, which losses at equal seconds are of.
        missing: runs that are not done yet.
    """

    title: str
    rows: Sequence[Summary]
    chance: float
    seconds: float | None
    missing: int

    def csv(self) -> str:
        file = io.StringIO()
        writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.cells() for row in self.rows)
        return file.getvalue()

    def text(self) -> str:
        """A table for the terminal, in columns of equal width."""
        head = [name.replace("\n", " ") for name in COLUMNS.values()]
        body = [[_short(key, value) for key, value in row.cells().items()] for row in self.rows]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                 for line in [head, *body]]  # fmt: skip
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            runs = [
                {"name": one.name, "seed": one.seed, "settings": one.settings} | dict(one.fields) for one in row.results
            ]
            rates = {f"{rate:g}": loss for rate, loss in row.rates.items()}
            rows.append(row.cells() | {"trouble": list(row.trouble), "learning_rates": rates, "runs": runs})
        return {
            "title": self.title, "chance": self.chance, "seconds": self.seconds, "missing_runs": self.missing,
            "rows": rows,
        }  # fmt: skip


def build_comparison(
    title: str, results: Mapping[str, Sequence[Result]], seeds: Sequence[int], chance: float
) -> Comparison:
    """Summaries of the finished runs of each row; rows without any are left out.

    Args:
        results: by row.
        seeds: that each row is to be trained with.
    """
    chosen = {name: _chosen(found, seeds[0]) for name, found in results.items() if found}
    spans = [_time(runs) for runs in chosen.values()]
    seconds = min((span for span in spans if span is not None), default=None)
    first = chosen.get(next(iter(results)), [])
    rows = [_summary(name, runs, results[name], first, seeds[0], seconds, chance) for name, runs in chosen.items()]
    missing = sum(len(seeds) - len(chosen.get(name, [])) for name in results)
    return Comparison(title=title, rows=rows, chance=chance, seconds=seconds, missing=missing)


def _chosen(results: Sequence[Result], seed: int) -> list[Result]:
    """The runs with the learning rate that was best with the first seed."""
    trials = [result for result in results if result.seed == seed] or list(results)
    best = min(trials, key=lambda result: result.final_or_infinity)
    return [result for result in results if result.lr == best.lr]


def _summary(
    name: str, runs: Sequence[Result], all_runs: Sequence[Result], first: Sequence[Result], seed: int,
    seconds: float | None, chance: float,
) -> Summary:  # fmt: skip
    finals = [run.final for run in runs if run.final is not None]
    timed = [] if seconds is None else [run.measured.loss_at(seconds) for run in runs]
    at_seconds = [loss for loss in timed if loss is not None and math.isfinite(loss)]
    steps = [run.measured.step_seconds for run in runs if run.measured.step_seconds]
    memory = [run.memory for run in runs if run.memory is not None]
    paired = paired_differences(runs, first)
    rates = {run.lr: run.final for run in all_runs if run.seed == seed}
    trouble = [f"seed {run.seed}: {what}" for run in runs for what in divergence(run.measured, chance, run.error)]
    return Summary(
        name=name, lr=runs[0].lr, parameters=runs[0].parameters, results=runs,
        loss=mean(finals) if finals else None, low=min(finals, default=None), high=max(finals, default=None),
        against=mean(paired) if paired and runs is not first else None,
        verdict="" if runs is first else verdict(paired),
        # A mean over some of the seeds would be of other runs than the others'.
        loss_at_seconds=mean(at_seconds) if len(at_seconds) == len(runs) and runs else None,
        step_seconds=median(steps) if steps else None, memory=max(memory) if memory else None,
        rates=rates,
        trouble=trouble + at_edge(runs[0].lr, rates),
    )  # fmt: skip


def at_edge(rate: float, rates: Mapping[float, float | None]) -> list[str]:
    """In words that the best of several learning rates is the highest or the lowest: a better one may lie beyond."""
    if len(rates) > 1 and rate in (min(rates), max(rates)):
        return [f"best at the {'lowest' if rate == min(rates) else 'highest'} lr tried"]
    return []


def paired_differences(runs: Sequence[Result], first: Sequence[Result]) -> list[float]:
    """Of each seed that both have finished, the loss of `runs` less that of `first`: seeds share the data's order."""
    base = {run.seed: run.final for run in first}
    found = []
    for run in runs:
        other = base.get(run.seed)
        if run.final is not None and other is not None:
            found.append(run.final - other)
    return found


def verdict(differences: Sequence[float]) -> str:
    """How sure a difference is: all seeds on one side, and its mean beyond their spread around it."""
    lower = sum(difference < 0 for difference in differences)
    count = len(differences)
    if count < 2:
        return "one seed alone" if count else ""
    side, agreeing = ("lower", lower) if 2 * lower >= count else ("higher", count - lower)
    told = f"{agreeing} of {count} {side}"
    spread = max(differences) - min(differences)
    return told if agreeing == count and abs(mean(differences)) > spread else f"{told}, within the spread"


def _time(runs: Sequence[Result]) -> float | None:
    """Seconds that the row trained, the median over its seeds; None where no run came to its end."""
    found = [run.measured.seconds[-1] for run in runs if run.final is not None and run.measured.step_seconds]
    return median(found) if found else None


def _short(key: str, value: str | int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if key == "against":
            return f"{value:+.4f}"
        return f"{value:.3g}" if key in ("lr", "step_seconds") else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value
