"""What a comparison is: the options that all rows share, and rows that differ from them in few.

Owns: the form of `configs/compare/*.yaml`, and the configuration of each run that follows from it. Does not own: the
options of a run (`config`), running them (`compare`).
"""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dalle_torch.config import RunConfig, ShapesDataConfig
from dalle_torch.config.checks import below, not_finite, refuse
from dalle_torch.config_io import load_config


@dataclass(frozen=True, kw_only=True)
class ComparisonDataConfig:
    """Captioned shapes, drawn and encoded once for all rows; shards of one's own go into `run.data` instead."""

    shapes: ShapesDataConfig = field(default_factory=lambda: ShapesDataConfig(scenes=4000))
    """Scenes to train on."""
    model: str = "shapes"
    """Source of tokenizer and VQGAN: a folder as `dalle-torch export` writes it, or "shapes", the embedded one."""
    evaluation_scenes: int = 256
    evaluation_seed: int = 12345
    """Of the scenes that the evaluation loss is measured on; their captions leave nothing open."""

    def __post_init__(self) -> None:
        problems = below(self, 1, "evaluation_scenes")
        if self.evaluation_seed == self.shapes.seed:
            problems.append(f"evaluation_seed={self.evaluation_seed} is shapes.seed too: take another one")
        refuse("data", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One of the things that are compared."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    """Options of the run by dotted name, as "model.options.ln_positions", that replace those of `run`; a whole section
    such as "optimizer" may be one."""
    learning_rates: list[float] = field(default_factory=list)
    """Each is trained with the first seed, and the one with the lowest evaluation loss goes on with the others. Empty:
    `optimizer.lr` as it is."""

    def __post_init__(self) -> None:
        problems = [] if slug(self.name) else [f"name={self.name!r} needs a letter or a digit"]
        problems += [f"learning_rates has {rate}, which must be above 0" for rate in self.learning_rates if rate <= 0]
        if len(set_of(self.learning_rates)) < len(self.learning_rates):
            problems.append(f"learning_rates={self.learning_rates} has one twice")
        if self.learning_rates and "optimizer.lr" in self.set:
            problems.append("optimizer.lr has no effect beside learning_rates: leave one out")
        refuse(f"row {self.name!r}", problems)


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """A comparison: what `dalle-torch compare FILE` reads."""

    title: str = "Comparison"
    run: dict[str, Any]
    """Options that all rows share, as a file of `configs/train` has them."""
    rows: list[Row]
    """The first one is what the others are set against."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Of weights and of the order of the data; each row is trained once with each."""
    data: ComparisonDataConfig | None = None
    """null: `run.data` names shards."""

    def __post_init__(self) -> None:
        problems = []
        if not self.rows:
            problems.append("rows is empty: name what is compared")
        if not self.seeds or len(set_of(self.seeds)) < len(self.seeds):
            problems.append(f"seeds={self.seeds} must be one or more different ones")
        names = [slug(row.name) for row in self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            problems.append(f"rows have the same folder name twice: {', '.join(twice)}")
        shards = self.run.get("data") or {}
        if self.data is not None and (shards.get("train") or shards.get("evaluation")):
            problems.append("run.data names shards, and data makes some: leave one out")
        if self.data is None and not (shards.get("train") and shards.get("evaluation")):
            problems.append("run.data.train and run.data.evaluation name no shards: set both, or data to make some")
        refuse("comparison", problems)


@dataclass(frozen=True)
class PlannedRun:
    """One training of one row.

    Attributes:
        lr: the learning rate, where the row has several.
    """

    row: str
    seed: int
    lr: float | None
    config: RunConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{slug(self.row)}{rate}-seed{self.seed}"


def load_comparison(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Read a file of `configs/compare`; overrides below "run." reach into all rows' options.

    Raises:
        FileNotFoundError, ValueError: as `config_io.load_config`.
    """
    import yaml

    inner = [override for override in overrides if override.startswith("run.") and "=" in override]
    config = load_config(ComparisonConfig, path, [override for override in overrides if override not in inner])
    tree = deepcopy(config.run)
    for override in inner:
        key, value = override.removeprefix("run.").split("=", 1)
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {override}: {value!r} is no YAML value") from error
        place(tree, key, parsed)
    return replace(config, run=tree)


def plan_runs(
    config: ComparisonConfig, row: Row, seeds: Sequence[int], rates: Sequence[float | None], shared: Mapping[str, Any]
) -> list[PlannedRun]:
    """The runs of a row, one for each seed and rate.

    Args:
        shared: options by dotted name that the comparison itself sets, such as where the data lie.

    Raises:
        ValueError: the options of the row do not fit each other; names the row.
    """
    return [
        PlannedRun(row.name, seed, rate, _compose(config, row, seed, rate, shared)) for rate in rates for seed in seeds
    ]


def place(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set what the dotted `key` names in nested dicts, which are made where there are none."""
    *above, last = key.split(".")
    for name in above:
        below_it = tree.get(name)
        if not isinstance(below_it, dict):
            below_it = tree[name] = {}
        tree = below_it
    tree[last] = deepcopy(value)


def slug(name: str) -> str:
    """A name as a folder can have it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def set_of(values: Sequence[Any]) -> set[Any]:
    """`Row.set` hides the builtin in that class."""
    return set(values)


def _compose(config: ComparisonConfig, row: Row, seed: int, rate: float | None, shared: Mapping[str, Any]) -> RunConfig:
    tree = deepcopy(config.run)
    for key, value in shared.items():
        place(tree, key, value)
    for key, value in row.set.items():
        place(tree, key, value)
    place(tree, "training.seed", seed)
    place(tree, "data.seed", seed)
    if rate is not None:
        place(tree, "optimizer.lr", rate)
    return run_config_of(tree, f"row {row.name!r}")


def run_config_of(tree: Mapping[str, Any], where: str) -> RunConfig:
    """The options of a run out of nested dicts, checked as those of a file are.

    Raises:
        ValueError: they cannot be used; `where` begins the message.
    """
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True), encoding="utf-8")
        try:
            return load_config(RunConfig, file)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), where)) from error


def settings_of(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What decides the result of a run, apart from where the comparison lies and who is told of it."""
    from dalle_torch.storage.embedded import EMBEDDED

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            for name, where in EMBEDDED.items():
                value = value.replace(str(where), f"embedded:{name}")
            return value.replace(str(folder), ".")
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    settings: dict[str, Any] = plain(asdict(config))
    del settings["tracking"]
    return settings
