"""The settings that can be changed while a run goes, and how a configuration changes.

Owns: their table, what a user may type for them, and which changes a run cannot take. Does not own: how requests reach
a run (`control`), bounds (`config`).
"""

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dalle_torch.config import OptimizerConfig, RunConfig, ShampooConfig

Value = int | float | None


@dataclass(frozen=True)
class Adjustable:
    """A setting: its dotted name in `RunConfig`, its short one, its type, whether it can be null, what it means."""

    name: str
    short: str
    type: type
    optional: bool
    meaning: str

    def parse(self, text: str) -> Value:
        """What a user typed. Raises ValueError."""
        if text.strip().lower() in ("null", "none", "~"):
            return self.check(None)
        try:
            return self.check(int(text) if self.type is int else float(text))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{self.name}={text} is not {self._kind()}") from error

    def check(self, value: object) -> Value:
        """`value`, read from JSON, as the setting has it. Raises ValueError."""
        if value is None and self.optional:
            return None
        if self.type is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
        elif self.type is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ValueError(f"{self.name}={shown(value)} is not {self._kind()}")

    def missing(self, config: RunConfig) -> str | None:
        """Why a run of that configuration does not have the setting; None: it does."""
        optimizer = config.optimizer.name
        if (".shampoo." in self.name and optimizer != "shampoo") or (
            self.name in ("optimizer.beta1", "optimizer.beta2") and optimizer == "adafactor"
        ):
            return f"{self.name} has no effect with optimizer.name={optimizer}"
        return None

    def _kind(self) -> str:
        kind = "a whole number" if self.type is int else "a finite number"
        return f"{kind} or null" if self.optional else kind


def _field(path: str) -> tuple[type, bool]:
    """Type of a number in `RunConfig`, and whether it can be null."""
    owner: Any = RunConfig
    for name in path.split("."):
        hint = typing.get_type_hints(owner)[name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        owner = next(option for option in options if option is not types.NoneType)
    return owner, types.NoneType in options


def _table() -> dict[str, Adjustable]:
    rows = [
        ("optimizer.lr", "learning_rate", "highest learning rate; the whole schedule is scaled with it"),
        ("optimizer.weight_decay", "weight_decay", "on matrices and kernels"),
        ("optimizer.beta1", "beta1", "share of the old in the mean of gradients"),
        ("optimizer.beta2", "beta2", "share of the old in the mean of their squares"),
        ("optimizer.max_grad_norm", "max_grad_norm", "gradients whose norm is larger are scaled down to it"),
        ("optimizer.shampoo.preconditioning_compute_steps", "preconditioning_compute_steps",
         "updates between computations of the preconditioners"),
        ("data.blank_caption_prob", "blank_caption_prob", "share of captions that are blanked"),
        ("data.min_clip_score", "min_clip_score", "samples with a lower score are left out"),
        ("data.max_clip_score", "max_clip_score", "samples with a higher score are left out"),
        ("training.log_every", "log_every", "updates between log events"),
        ("training.eval_every", "eval_every", "updates between evaluations"),
        ("training.save_every", "save_every", "updates between checkpoints"),
        ("samples.every", "sample_every", "updates between sample pictures"),
        ("scores.every", "score_every", "updates between scores of drawn pictures"),
    ]  # fmt: skip
    return {name: Adjustable(name, short, *_field(name), meaning) for name, short, meaning in rows}


ADJUSTABLE: Mapping[str, Adjustable] = types.MappingProxyType(_table())
"""By dotted name."""

WORDS: Mapping[str, str] = types.MappingProxyType(
    {"save": "save a checkpoint now", "stop": "stop after saving a checkpoint"}
)


def find(name: str) -> Adjustable:
    """The setting of that dotted or short name.

    Raises:
        ValueError: there is none; near ones are named, or all.
    """
    by_name = {**ADJUSTABLE, **{setting.short: setting for setting in ADJUSTABLE.values()}}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name, [*by_name, *WORDS], n=3)
    if near:
        raise ValueError(f"{name!r} cannot be adjusted; did you mean {' or '.join(near)}?")
    known = ", ".join([*(setting.short for setting in ADJUSTABLE.values()), *WORDS])
    raise ValueError(f"{name!r} cannot be adjusted while a run goes; what can: {known}")


def value_of(config: RunConfig, name: str) -> Value:
    """What a setting of the table is in `config`, with the defaults of Shampoo where its section is left out."""
    value: Any = config
    for part in name.split("."):
        if part == "shampoo" and value.shampoo is None:
            value = ShampooConfig()
        else:
            value = getattr(value, part)
    return value


def with_values(config: RunConfig, values: Mapping[str, Value]) -> RunConfig:
    """`config` with settings, by dotted name, laid over it all at once. Pure.

    Raises:
        ValueError: the result cannot be used; the configuration's own words.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return _replaced(config, tree)


def _replaced(owner: Any, tree: Mapping[str, Any]) -> Any:
    new = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            section = getattr(owner, name)
            if section is None and isinstance(owner, OptimizerConfig):
                section = ShampooConfig()
            value = _replaced(section, value)
        new[name] = value
    return replace(owner, **new)


def check_change(config: RunConfig, values: Mapping[str, Value]) -> RunConfig:
    """`with_values`, for a run that goes on in the same process.

    Raises:
        ValueError: the result cannot be used, or the run cannot take the change without being started again.
    """
    problems = [reason for name in values if (reason := ADJUSTABLE[name].missing(config))]
    norm = "optimizer.max_grad_norm"
    if norm in values and (values[norm] is None) != (config.optimizer.max_grad_norm is None):
        problems.append(
            f"{norm}={shown(values[norm])}: clipping cannot be turned on or off while the run goes, since the step "
            f"would be compiled again; a large value clips nothing"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return with_values(config, values)


def shown(value: object) -> str:
    """A value as a user would type it."""
    return "null" if value is None else str(value)
