"""A comparison from its configuration to its results: the same data, seeds and budget, one factor changed.

Owns: which runs there are and which of them are done, the choice among learning rates, what is kept in the folder. Does
not own: the form of the configuration (`compare_config`), processes (`compare_pool`), a run (`compare_run`), what
results say (`compare_table`, `compare_report`).
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dalle_torch.config_io import save_config
from dalle_torch.log import get_logger, progress
from dalle_torch.storage import atomic_file
from dalle_torch.studies.compare_config import ComparisonConfig, PlannedRun, Row, plan_runs, settings_of, slug
from dalle_torch.studies.compare_data import chance_level, data_options, make_data
from dalle_torch.studies.compare_pool import run_all
from dalle_torch.studies.compare_run import PLANNED, RESULT
from dalle_torch.studies.compare_table import Comparison, Result, build_comparison
from dalle_torch.training.run_folder import differences
from dalle_torch.training.setup import model_config

logger = get_logger(__name__)

SETTINGS = "settings.json"
_DEFAULT_SAVES = 4
"""Times that a run is saved, where the file does not say how often."""


class Study:
    """A comparison in a folder.

    Args:
        config: what is compared.
        output: its folder; what is there is gone on with.
        rerun: train runs anew whose settings are no longer those they were trained with.

    Raises:
        ValueError: options do not fit each other, or `output` has runs of other settings; the message names the row.
        OSError: the folder cannot be written.
    """

    def __init__(self, config: ComparisonConfig, output: str | os.PathLike[str], rerun: bool = False) -> None:
        self.config, self.output, self.rerun = config, Path(output).expanduser().absolute(), rerun
        self.runs = self.output / "runs"
        shared: dict[str, Any] = {} if config.data is None else data_options(config.data, self.output)
        shared |= _defaults(config)
        self._shared = shared
        self.plans = {row.name: self._plan(row, config.seeds, row.learning_rates or [None]) for row in config.rows}
        self._check()

    def train(self, jobs: int, rows: Sequence[str] = (), seeds: Sequence[int] = ()) -> dict[str, str]:
        """Train what is not done, `jobs` runs at a time; returns the runs that failed, by name, and why.

        Args:
            rows, seeds: train these alone, of those in the file; empty: all.

        Raises:
            KeyboardInterrupt: Ctrl-C; what is done is kept, and the same call goes on.
            ValueError: a row or a seed is not in the file, or a row's rate is not chosen yet.
        """
        rows, seeds = self._chosen(rows, seeds)
        self._check_rates(rows, seeds)
        if self.config.data is not None:
            make_data(self.config.data, self.output)
        self.chance()
        first = self.config.seeds[0]
        failed: dict[str, str] = {}
        # Rows with several rates come to their other seeds when the rate is chosen.
        needed = [run for name in rows for run in self._needed(self._row(name)) if run.seed in seeds]
        with progress(total=len(needed), desc="comparing", unit="run") as bar:
            bar.update(sum(map(self._is_done, needed)))
            for stage in ([first], seeds):
                wanted = [run for name in rows for run in self._wanted(self._row(name))]
                wanted = [run for run in wanted if run.seed in stage and run.seed in seeds]
                # Row after row for each seed, so that an early stop leaves a whole comparison of fewer seeds.
                wanted.sort(key=lambda run: self.config.seeds.index(run.seed))
                started = [run for run in wanted if not self._is_done(run) and run.name not in failed]
                folders = {self._prepare(run): run.name for run in started}
                found = run_all(list(folders), jobs, lambda folder: bar.update() and None)
                failed |= {folders[folder]: reason for folder, reason in found.items()}
        return failed

    def chance(self) -> float:
        """The loss of a model that has learnt nothing; see `compare_data.chance_level`. Computed once."""
        config = next(iter(self.plans.values()))[0].config
        data = {"train": config.data.train, "evaluation": config.data.evaluation}
        key = json.dumps(data, sort_keys=True).replace(str(self.output), ".")
        file = self.output / "chance.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["data"] == key:
                return float(found["loss"])
        loss = chance_level(config)
        _write_json(file, {"data": key, "loss": loss})
        return loss

    def results(self) -> Comparison:
        """What is there so far.

        Raises:
            FileNotFoundError: no run is finished.
        """
        found = {
            row.name: [self._result(run) for run in self.plans[row.name] if self._is_done(run)]
            for row in self.config.rows
        }
        if not any(found.values()):
            raise FileNotFoundError(f"{self.output} has no finished run of this comparison: leave out --report-only")
        return build_comparison(self.config.title, found, self.config.seeds, self.chance())

    def _plan(self, row: Row, seeds: Sequence[int], rates: Sequence[float | None]) -> list[PlannedRun]:
        runs = plan_runs(self.config, row, seeds, rates, self._shared)
        return [self._tracked(run) for run in runs]

    def _tracked(self, run: PlannedRun) -> PlannedRun:
        """In wandb a comparison is a group, and each run has its row's name."""
        tracking = run.config.tracking
        group = tracking.group or slug(self.config.title)
        named = replace(tracking, group=group, name=run.name) if tracking.wandb != "off" else tracking
        return replace(run, config=replace(run.config, tracking=named))

    def _check(self) -> None:
        changed = []
        for runs in self.plans.values():
            model_config(runs[0].config.model)
            for run in runs:
                if run.config.runtime.backend == "xla":
                    raise ValueError("run.runtime.backend=xla: comparisons run one process a run, so take accelerate")
                before = self._settings_before(run)
                if before is not None and before != self._settings(run):
                    changed.append((run.name, differences(before, self._settings(run))))
        if changed and not self.rerun:
            name, difference = changed[0]
            what = "; ".join(str(one) for one in difference[:3])
            raise ValueError(
                f"{self.output} has {len(changed)} run(s) of other settings, as {name} ({what}): name another "
                f"--output, or add --rerun to train them anew"
            )

    def _chosen(self, rows: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
        known = {slug(name): name for name in self.plans}
        strangers = [name for name in rows if slug(name) not in known]
        if strangers:
            raise ValueError(f"{', '.join(strangers)}: no such row; there are {', '.join(self.plans)}")
        others = [str(seed) for seed in seeds if seed not in self.config.seeds]
        if others:
            raise ValueError(f"seed {', '.join(others)} is not in seeds={self.config.seeds} of the comparison")
        return [known[slug(name)] for name in rows] or list(self.plans), list(seeds or self.config.seeds)

    def _row(self, name: str) -> Row:
        return next(row for row in self.config.rows if row.name == name)

    def _needed(self, row: Row) -> list[PlannedRun]:
        """As many runs of a row as there will be, whichever its rate."""
        runs, first = self.plans[row.name], self.config.seeds[0]
        rates: Sequence[float | None] = row.learning_rates[:1] or [None]
        return [run for run in runs if run.seed == first or run.lr in rates]

    def _wanted(self, row: Row) -> list[PlannedRun]:
        """The runs with the first seed, and those with the rate that was best there."""
        runs, first = self.plans[row.name], self.config.seeds[0]
        if not row.learning_rates:
            return runs
        trials = [run for run in runs if run.seed == first]
        if any(not self._is_done(run) for run in trials):
            return trials
        best = min(trials, key=lambda run: self._result(run).final_or_infinity)
        return trials + [run for run in runs if run.seed != first and run.lr == best.lr]

    def _check_rates(self, rows: Sequence[str], seeds: Sequence[int]) -> None:
        """Other seeds than the first take the rate that was best with that one."""
        first = self.config.seeds[0]
        unknown = [name for name in rows if self._row(name).learning_rates and not self._rate_chosen(name)]
        if unknown and first not in seeds:
            raise ValueError(
                f"the learning rate of {', '.join(unknown)} is chosen by the runs with seed {first}, which are not all "
                f"in {self.output}: train those first (--seed {first}), or leave --seed out"
            )

    def _rate_chosen(self, name: str) -> bool:
        first = self.config.seeds[0]
        return all(self._is_done(run) for run in self.plans[name] if run.seed == first)

    def _prepare(self, run: PlannedRun) -> Path:
        folder = self.runs / run.name
        if self._settings_before(run) not in (None, self._settings(run)):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / SETTINGS, self._settings(run))
        save_config(run.config, folder / PLANNED)
        return folder

    def _is_done(self, run: PlannedRun) -> bool:
        done = (self.runs / run.name / RESULT).is_file()
        return done and self._settings_before(run) == self._settings(run)

    def _result(self, run: PlannedRun) -> Result:
        fields = json.loads((self.runs / run.name / RESULT).read_text(encoding="utf-8"))
        return Result.from_json(run.name, run.row, run.seed, run.config.optimizer.lr, self._settings(run), fields)

    def _settings(self, run: PlannedRun) -> dict[str, Any]:
        return settings_of(run.config, self.output)

    def _settings_before(self, run: PlannedRun) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.runs / run.name / SETTINGS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found


def _defaults(config: ComparisonConfig) -> dict[str, Any]:
    """What a comparison wants otherwise than a single run, where its file does not say."""
    given = config.run
    found: dict[str, Any] = {}
    steps = (given.get("training") or {}).get("steps", 1000)
    for key, value in (
        # One process a run is what the cores are for.
        ("data.workers", 0),
        ("training.save_every", max(1, math.ceil(steps / _DEFAULT_SAVES))),
        ("checkpoint.keep", 1),
    ):
        section, name = key.split(".")
        if name not in (given.get(section) or {}):
            found[key] = value
    return found


def save_results(comparison: Comparison, config: ComparisonConfig, output: Path) -> None:
    """Write `comparison.json` and `comparison.csv` into `output`, whole or not at all. Raises OSError."""
    _write_json(output / "comparison.json", comparison.to_json() | {"config": asdict(config)})
    with atomic_file(output / "comparison.csv") as file:
        file.write_text(comparison.csv(), encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
